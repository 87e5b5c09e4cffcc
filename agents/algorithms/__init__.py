"""The algorithms, a file each, and the mathematics that they share (:mod:`~agents.algorithms.maths`)."""
