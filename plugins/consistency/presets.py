"""Published training configurations, as keywords of the objective. Torch-free."""

CT = {"mode": "ct", "scale_mode": "progressive", "start_scales": 2, "target": "adaptive", "distance": "lpips"}
PRESETS = {
    "cd": {
        "mode": "cd",
        "start_scales": 40,
        "end_scales": 40,
        "target": "fixed",
        "target_decay": 0.95,
        "distance": "lpips",
    },
    "ct-imagenet64": {**CT, "end_scales": 200, "total_steps": 800_000, "target_decay": 0.95},
    "ct-lsun256": {**CT, "end_scales": 150, "total_steps": 1_000_000, "target_decay": 0.95},
    "ict": {
        "mode": "ct",
        "scale_mode": "doubling",
        "start_scales": 10,
        "end_scales": 1280,
        "target": "none",
        "distance": "pseudo-huber",
        "weighting": "ict",
        "time_sampling": "lognormal",
    },
}
