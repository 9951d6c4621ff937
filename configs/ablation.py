"""Rows of the paper's tables, one model each: MPDiT-B and XL with one part changed, and DiT and SiT baselines.

    python -m mpdit_jax.train --config=ablation:time_linear_2 --workdir=runs/time_linear_2

Cost and expected result: `python -m mpdit_jax.tables --format=list` (or this file with --list) prints what each row
changes, the parameters, GFLOPs and FID that the paper prints for it, and remarks; without --format it prints our own
counts beside them. Every row is trained on ImageNet at 256x256 pixels for 80 epochs in batches of 1,024 at a constant
2e-4, as the paper compares models. docs/latents.md prepares the latents. No row has been trained with this code yet.
"""

import argparse

from ml_collections import ConfigDict

from mpdit_jax.config.ablation import ablation_config, list_rows


def get_config(name: str = "") -> ConfigDict:
    return ablation_config(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a row with --config=ablation:NAME.")
    parser.add_argument("--list", action="store_true", required=True, help="print the rows")
    parser.parse_args()
    print(list_rows())
