"""The metrics the host brings. Torch-free."""

from __future__ import annotations

from vgm_cli.hookspecs import Component

METRICS = {
    "fid": ("frechet:FID", "Frechet distance of features, lower is better"),
    "fid-inf": ("frechet:FIDInfinity", "FID extrapolated to infinitely many samples"),
    "sfid": ("frechet:SpatialFID", "FID of Inception's spatial features"),
    "fd-dinov2": ("frechet:FDDINOv2", "Frechet distance of DINOv2 features (weights by --features)"),
    "cmmd": ("kernel:CMMD", "Gaussian kernel distance of CLIP embeddings (weights by --features)"),
    "kid": ("kernel:KID", "unbiased kernel distance of features, lower is better"),
    "precision-recall": ("manifold:PrecisionRecall", "fidelity and variety by nearest neighbours, 0 to 1"),
    "density-coverage": ("manifold:DensityCoverage", "their versions that resist outliers"),
    "inception-score": ("inception_score:InceptionScore", "confidence and variety of a classifier, higher is better"),
    "class-accuracy": ("class_accuracy:ClassAccuracy", "share of conditional samples recognised as their class"),
    "retrieval": ("retrieval:Retrieval", "share of samples that find the picture of their caption among all pictures"),
    "clip-score": ("clip_score:CLIPScore", "agreement of samples with their texts by CLIP (weights by --features)"),
    "psnr": ("image:PSNR", "peak signal-to-noise ratio of pairs in dB, higher is better"),
    "ssim": ("image:SSIM", "structural similarity of pairs, at most 1"),
    "ms-ssim": ("image:MSSSIM", "structural similarity of pairs over five scales, at most 1"),
    "lpips": ("image:LPIPSDistance", "learned perceptual distance of pairs, lower is better"),
    "edge-f1": ("edges:EdgeF1", "agreement of edges of pairs, of samples that follow a hint, 0 to 1"),
    "ppl": ("path_length:PerceptualPathLength", "perceptual change per step in a generator's latent space"),
    "bits-per-dim": ("likelihood:BitsPerDim", "negative log-likelihood of images, lower is better"),
    "bayes-accuracy": ("bayes:BayesAccuracy", "share of images whose own class makes them likeliest, by the model"),
    "straightness": (
        "straightness:Straightness",
        "how far a flow's trajectories are from straight lines, 0 is straight",
    ),
    "memorisation": (
        "memorisation:Memorisation",
        "are samples nearer to training images than real images are? 0.5 is fair",
    ),
}


def components() -> list[Component]:
    return [
        Component(kind="metric", name=name, target=f"vgm_cli.metrics.{target}", summary=summary)
        for name, (target, summary) in METRICS.items()
    ]
