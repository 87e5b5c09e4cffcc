"""Games: what answers the policy between its turns in ``TextGame-v0``.

A game is any object with the two methods of :class:`textrl_env.protocols.Game`. :mod:`textrl_env.games.loading` makes
games from what users give, :mod:`textrl_env.games.playing` talks to them as to foreign code, and
:mod:`textrl_env.games.layout` turns their texts into tokens.
"""
