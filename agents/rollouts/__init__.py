"""From an environment to what an agent learns from: collectors, the rollout, and the log of its episodes."""
