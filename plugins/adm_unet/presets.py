"""Published configurations (openai/guided-diffusion@22e0df8, README), as constructor keywords. Torch-free."""

MULT = {64: [1, 2, 3, 4], 128: [1, 1, 2, 3, 4], 256: [1, 1, 2, 2, 4, 4], 512: [0.5, 1, 1, 2, 2, 4, 4]}


def attention(size: int, *pixels: int) -> list[int]:
    """Downsampling factors at which an image of `size` is `pixels` wide."""
    return [size // p for p in pixels]


def unet(size: int, **own: object) -> dict[str, object]:
    base = {"model_channels": 256, "num_res_blocks": 2, "channel_mult": MULT[size], "num_head_channels": 64}
    return base | {"attention_resolutions": attention(size, 32, 16, 8)} | own


def classifier(size: int, depth: int = 2) -> dict[str, object]:
    own = {"image_size": size, "model_channels": 128, "num_res_blocks": depth, "pool": "attention"}
    return unet(size) | own


HEADS_4 = {"num_heads": 4, "num_head_channels": None}

PRESETS = {
    "64": unet(64, model_channels=192, num_res_blocks=3, dropout=0.1, use_new_attention_order=True),
    "128": unet(128, **HEADS_4),
    "256": unet(256),
    "256-uncond": unet(256, num_classes=0),
    "512": unet(512),
    "512-uncond": unet(512, num_classes=0),
    "64-256-upsampler": unet(256, model_channels=192, super_res=True, **HEADS_4),
    # the large size of this upsampler is 512, but its multipliers are those of 256
    "128-512-upsampler": unet(512, model_channels=192, super_res=True, channel_mult=MULT[256])
    | {"attention_resolutions": attention(512, 32, 16)},
    "lsun256": unet(256, num_classes=0, dropout=0.1),  # bedroom, cat, horse
    "lsun256-nodropout": unet(256, num_classes=0),  # horse_nodropout
}
CLASSIFIERS = {str(size): classifier(size, depth=4 if size == 64 else 2) for size in MULT}
