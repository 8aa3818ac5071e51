"""Original checkpoints -> our modules: one table of names per component, and the engine that applies them strictly."""
