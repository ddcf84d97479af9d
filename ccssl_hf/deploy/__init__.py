"""Use a published model: predict, evaluate, serve, export, write a Space; convert checkpoints of other code."""
