"""The metrics the host brings. Torch-free."""

from __future__ import annotations

from vgm_cli.hookspecs import Component

METRICS = {
    "fid": ("frechet:FID", "Frechet distance of features, lower is better"),
    "fid-inf": ("frechet:FIDInfinity", "FID extrapolated to infinitely many samples"),
    "sfid": ("frechet:SpatialFID", "FID of Inception's spatial features"),
    "kid": ("kernel:KID", "unbiased kernel distance of features, lower is better"),
    "precision-recall": ("manifold:PrecisionRecall", "fidelity and variety by nearest neighbours, 0 to 1"),
    "density-coverage": ("manifold:DensityCoverage", "their versions that resist outliers"),
    "inception-score": ("inception_score:InceptionScore", "confidence and variety of a classifier, higher is better"),
    "class-accuracy": ("class_accuracy:ClassAccuracy", "share of conditional samples recognised as their class"),
    "psnr": ("image:PSNR", "peak signal-to-noise ratio of pairs in dB, higher is better"),
    "ssim": ("image:SSIM", "structural similarity of pairs, at most 1"),
    "ms-ssim": ("image:MSSSIM", "structural similarity of pairs over five scales, at most 1"),
}


def components() -> list[Component]:
    return [
        Component(kind="metric", name=name, target=f"vgm_cli.metrics.{target}", summary=summary)
        for name, (target, summary) in METRICS.items()
    ]
