"""Tuning: batches → features → loss → one step of the optimizer, again and again.

`run` sets a run up and loops over its steps; `inputs` makes what a step reads, ahead of it; `step` takes one; `memory`
says how much passes a tower at once; `held_out` evaluates on the way; `state` writes checkpoints and goes on from them.
"""
