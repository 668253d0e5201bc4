"""Rewriting: the pass contract, the registry, selectors, and the manager that orders, runs and checks passes.

Nothing is imported here: `entry`, `registry` and `selectors` are light; `pass_`, `emit`, `manager` load torch.
"""
