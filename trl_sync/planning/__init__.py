"""Memory per GPU of PPO under one engine, from a model's config alone: no weights, no GPU.

`architecture` counts parameters, `formulas` turns counts into bytes, `engines` says what an engine
divides among its ranks, and `plan` adds it up. `trl-sync env --plan` prints it.
"""
