"""The paper's own figures, each with its place in it (arXiv 2310.00426; where its versions differ, both)."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class NounRow:
    """A row of Table 1: valid distinct nouns, distinct nouns, their ratio in percent as printed, nouns an image."""

    valid: str
    distinct: str
    valid_percent: float
    total: str
    per_image: float


TABLE_1 = {
    "LAION": NounRow("210K", "2461K", 8.5, "72.0M", 6.4),
    "LAION-LLaVA": NounRow("85K", "646K", 13.3, "233.9M", 20.9),
    "SAM-LLaVA": NounRow("23K", "124K", 18.6, "327.9M", 29.3),
    "Internal": NounRow("152K", "582K", 26.1, "136.6M", 12.2),
}

# Table 2: parameters and images as printed, zero-shot FID-30K on COCO, A100 days.
TABLE_2 = (
    ("DALL·E 2", "6.5B", "650M", 10.39, 41_667),
    ("SDv1.5", "0.9B", "2000M", 9.62, 6_250),
    ("GigaGAN", "0.9B", "2700M", 9.09, 4_783),
    ("Imagen", "3.0B", "860M", 7.27, 7_132),
    ("RAPHAEL", "3.0B", "5000M+", 6.61, 60_000),
    ("PixArt-α", "0.6B", "25M", 7.32, 753),
)

# Table 3: T2I-CompBench.
TABLE_3_AXES = ("Color", "Shape", "Texture", "Spatial", "Non-Spatial", "Complex")
TABLE_3: Mapping[str, tuple[float, ...]] = {
    "Stable v1.4": (0.3765, 0.3576, 0.4156, 0.1246, 0.3079, 0.3080),
    "Stable v2": (0.5065, 0.4221, 0.4922, 0.1342, 0.3096, 0.3386),
    "Composable v2": (0.4063, 0.3299, 0.3645, 0.0800, 0.2980, 0.2898),
    "Structured v2": (0.4990, 0.4218, 0.4900, 0.1386, 0.3111, 0.3355),
    "Attn-Exct v2": (0.6400, 0.4517, 0.5963, 0.1455, 0.3109, 0.3401),
    "GORS": (0.6603, 0.4785, 0.6287, 0.1815, 0.3193, 0.3328),
    "Dalle-2": (0.5267, 0.4747, 0.5804, 0.1283, 0.3078, 0.2967),
    "SDXL": (0.5879, 0.4687, 0.5299, 0.2133, 0.3119, 0.3237),
    "PixArt-α": (0.6690, 0.4927, 0.6477, 0.2064, 0.3197, 0.3433),
}

# Table 4: V100 days of each stage, whose sum is 1,656.
TABLE_4_V100_DAYS = {
    "pixel dependency, 256px": 88,
    "text-image alignment, 256px": 672,
    "high aesthetics, 256px": 416,
    "high aesthetics, 512px": 320,
    "high aesthetics, 1024px": 160,
}
V100_DAYS, A100_DAYS = 1_656, 753
A100_PER_V100 = 2.2  # footnote 3
SD15_A100_DAYS, RAPHAEL_A100_DAYS = 6_250, 60_000
DOLLARS, SD15_DOLLARS, RAPHAEL_DOLLARS = 28_400, 320_000, 3_080_000
# The first version's abstract: 10.8% of SDv1.5's time.
FIRST_A100_DAYS, FIRST_DOLLARS = 675, 26_000
IMAGES_MILLIONS, SD15_IMAGES_MILLIONS = 25, 2_000

# Section 3.3 and Figure 6.
ADALN_PARAMETERS_MILLIONS = {"single": 611, "per-block": 833}
ADALN_GIGABYTES = {"single": 23, "per-block": 29}
