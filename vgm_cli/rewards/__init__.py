"""Rewards: callables (images (B, C, H, W) in [-1, 1], batch) -> (B,) float32, larger is better.

batch is what the images were made for: "label" (B,) int64 where the model has classes, "text" a list of B prompts where
it reads them. A reward that needs what is not there says so in a VgmError."""
