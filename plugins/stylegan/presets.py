"""Published configurations of StyleGAN, StyleGAN2 and StyleGAN2-ADA as constructor keywords. Torch-free."""

# NVlabs/stylegan train.py: one network family, sizes by data set
GENERATOR = {
    f"{name}{size}": {"size": size, "in_channels": 3, "num_classes": 0}
    for name, size in (("ffhq", 1024), ("celebahq", 1024), ("ffhq", 512), ("ffhq", 256), ("lsun", 256))
}
DISCRIMINATOR = GENERATOR

# NVlabs/stylegan2-ada-pytorch train.py: cfg_specs, whose short mapping is the generator's alone; clamp 256 belongs to
# its half precision
RGB = {"in_channels": 3, "clamp": 256}
HALF_WIDTH = {"channel_base": 16384}
GENERATOR2 = {
    "stylegan2": {"size": 1024, **RGB},
    "paper1024": {"size": 1024, **RGB},
    "paper512": {"size": 512, **RGB},
    "paper256": {"size": 256, **RGB, **HALF_WIDTH},
    "cifar": {"size": 32, **RGB, "mapping_layers": 2},
    "auto": {**RGB, "mapping_layers": 2, **HALF_WIDTH},
    "auto512": {**RGB, "mapping_layers": 2},
}
DISCRIMINATOR2 = {
    "stylegan2": {"size": 1024, **RGB},
    "paper1024": {"size": 1024, **RGB},
    "paper512": {"size": 512, **RGB, "group_size": 8},
    "paper256": {"size": 256, **RGB, **HALF_WIDTH, "group_size": 8},
    "cifar": {"size": 32, **RGB, "architecture": "orig", "group_size": 32},
    "auto": {**RGB, **HALF_WIDTH},
    "auto512": {**RGB},
}
