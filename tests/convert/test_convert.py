"""`python -m mpdit_jax.convert` converts between all forms and refuses what it cannot convert."""

import dataclasses
import itertools
import resource
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax import export
from mpdit_jax.checkpoint.load import load_config
from mpdit_jax.convert import __main__ as convert
from mpdit_jax.data.info import DatasetInfo, read_dataset_info, record_dataset, write_dataset_info
from mpdit_jax.data.latents import PAPER_MEAN, PAPER_STD, LatentSpace
from mpdit_jax.data.sources import array_source
from mpdit_jax.errors import CheckpointError, DamageWarning
from mpdit_jax.evaluate import __main__ as evaluate
from mpdit_jax.model.parameters import abstract, merge, split
from mpdit_jax.model.presets import preset_config
from mpdit_jax.sample import __main__ as sample
from mpdit_jax.sample.decoding import make_decode
from mpdit_jax.vae import save_folder
from tests.conftest import Golden
from tests.sample.conftest import make_workdir
from tests.tiny import TWO_LEVELS, refusal, run, saved_arrays, start, train_arguments
from tests.vae.conftest import TINY as TINY_VAE
from tests.vae.conftest import tiny_parameters as tiny_parameters
from tests.vae.conftest import tiny_vae as tiny_vae

DIT = {"patch_sizes": (2,), "depths": (1,), "time_embedding": "sinusoidal", "class_tokens": 16}
DIT |= {"condition": "vector", "modulation": "per_block"}
TINY = {"depths": (1, 1), "hidden_size": 16, "num_heads": 2, "input_size": 8, "num_classes": 3, "class_tokens": 2}
SIZES = ("hidden_size", "num_heads", "num_classes")


def random_model(**fields):
    config = preset_config("mpdit_b", **{**TINY, **fields})
    structure, shapes = abstract(config)
    random = np.random.default_rng(0)
    return merge(structure, {k: jnp.asarray(random.normal(0, 0.3, s.shape), jnp.float32) for k, s in shapes.items()})


def same(first, second):
    one, other = split(first)[1], split(second)[1]
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """A published state dict as a safetensors file, and its model."""
    import safetensors.numpy

    state = Golden("mpdit_two_level_fno").group("state/")
    path = tmp_path_factory.mktemp("golden") / "published.safetensors"
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path)
    return path, mp.load_torch(path, num_heads=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own.safetensors", pytest.param("named.pt", marks=pytest.mark.parity)])
def test_a_disk_without_room(golden, tmp_path, name):
    """PyTorch reports a full disk by an error of its own, which becomes the same sentence."""

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    arguments = [f"--source={golden[0]}", f"--out={tmp_path / name}", "--num_heads=4"]
    process = start("convert", arguments, preexec_fn=little_room, extra={"JAX_ENABLE_COMPILATION_CACHE": "false"})
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: the system refused to read or write (File too large)" in stderr
    assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parity
def test_all_the_way_round(golden, tmp_path, capsys):
    """A model keeps its bits through a published file, a workdir, our file, a PyTorch file and our file again."""
    pytest.importorskip("torch")
    path, model = golden
    chain = [path, tmp_path / "run", tmp_path / "own.safetensors", tmp_path / "named.pt", tmp_path / "end.safetensors"]
    sums = set()
    for source, out in itertools.pairwise(chain):
        assert convert.main([f"--source={source}", f"--out={out}", "--num_heads=4"]) == 0
        text = capsys.readouterr().out
        assert f"read {source}" in text
        assert f"wrote {out}" in text
        sums |= {line.split()[2] for line in text.splitlines() if "forward pass" in line}
    assert len(sums) == 1
    assert same(mp.load_torch(tmp_path / "end.safetensors"), model)
    assert same(mp.load_checkpoint(tmp_path / "run"), model)
    assert same(mp.load_torch(tmp_path / "named.pt", num_heads=4), model)
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted(found.name for found in chain[1:])


def test_variants_keep_their_config(tmp_path, capsys):
    """Models without published names keep weights and config in our own file."""
    from mpdit_jax.interop.native_files import save_native

    model = random_model(upsampler="linear_mlp", fno_init="scaled", mlp_ratio=3.0)
    save_native(tmp_path / "model.safetensors", model, step=7)
    again = mp.load_torch(tmp_path / "model.safetensors")
    assert again.config == model.config
    assert same(again, model)
    message = refusal_of(f"--source={tmp_path / 'model.safetensors'}", f"--out={tmp_path / 'model.pt'}")
    assert "model.upsampler='linear_mlp' has no published PyTorch names" in message
    assert not (tmp_path / "model.pt").exists()
    capsys.readouterr()


@pytest.mark.slow
def test_a_run_starts_from_a_converted_workdir(tmp_path, capsys):
    """Training continues from the weights and the step of the file, with the given config."""
    from mpdit_jax.interop.native_files import save_native

    config, workdir, *tiny = train_arguments(tmp_path / "run", "--config.steps=6", *TWO_LEVELS)
    model = random_model(patch_sizes=(2, 1), depths=(2, 1), in_channels=1, num_classes=10)
    save_native(tmp_path / "model.safetensors", model, step=5)
    source = f"--source={tmp_path / 'model.safetensors'}"
    assert convert.main([source, f"--out={tmp_path / 'run'}", config, *tiny]) == 0
    assert "workdir of step 5" in capsys.readouterr().out
    assert same(mp.load_checkpoint(tmp_path / "run", ema=False), model)
    status, stdout, stderr = run("train", [config, workdir, *tiny])
    assert status == 0, stderr
    assert "continuing at step 5" in stdout
    assert "progress['step']" in saved_arrays(tmp_path / "run", 6)
    message = refusal_of(source, f"--out={tmp_path / 'other'}", config, *tiny, "--config.model.class_tokens=3")
    assert "--config is of another model: config.model.class_tokens=3 (the file: 2)." in message
    message = refusal_of(source, f"--out={tmp_path / 'other'}", config, *tiny, "--config.model.num_classes=7")
    assert "write --out=weights.safetensors without --config, and train with --config.init_from=weights" in message
    assert not (tmp_path / "other").exists()


@pytest.fixture
def no_sums(monkeypatch):
    """Conversions without check sums, whose forward passes take most of the time."""
    from mpdit_jax.convert import checksum, forms

    for module in (checksum, forms):
        monkeypatch.setattr(module, "checksum", lambda model: "")


def latents_run(path, fingerprint):
    """A run on latents of a VAE of that fingerprint."""
    workdir = make_workdir(path, in_channels=4)
    space = LatentSpace((1.0, 2.0, 3.0, 4.0), (0.5, 0.5, 0.5, 0.5), fingerprint)
    write_dataset_info(workdir, DatasetInfo(("owl", "fox"), space, "20 digest"))
    return workdir, space


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["safetensors", pytest.param("pt", marks=pytest.mark.parity)])
@pytest.mark.usefixtures("no_sums")
def test_what_decoding_needs_travels_with_a_model(tmp_path, tiny_vae, tiny_parameters, ending):
    save_folder(tmp_path / "vae", TINY_VAE, tiny_parameters)
    run, space = latents_run(tmp_path / "run", tiny_vae.fingerprint)
    file, back = tmp_path / f"model.{ending}", tmp_path / "back"
    assert convert.main([f"--source={run}", f"--out={file}"]) == 0
    assert convert.main([f"--source={file}", f"--out={back}"]) == 0
    assert read_dataset_info(back) == DatasetInfo(("owl", "fox"), space)
    decoded = [make_decode(str(folder), str(tmp_path / "vae"))(np.ones((1, 8, 8, 4))) for folder in (run, back)]
    assert np.array_equal(*decoded)


@pytest.mark.slow
@pytest.mark.usefixtures("no_sums")
def test_latents_of_published_weights_are_normalized_as_in_the_paper(tmp_path, capsys, tiny_parameters):
    """The command says so, and any VAE with four channels decodes them. Training continues on latents of that scale."""
    from mpdit_jax.interop.native_files import save_native

    vae, source, out = tmp_path / "vae", tmp_path / "model.safetensors", tmp_path / "run"
    save_folder(vae, TINY_VAE, tiny_parameters)
    save_native(source, random_model(), 1)
    fields = [f"--config.model.{name}={value}" for name, value in TINY.items() if name not in ("depths", "input_size")]
    config = ["--config=mpdit_b_256", "--config.model.depths=1,1", "--config.model.input_size=8,8", *fields]
    assert convert.main([f"--source={source}", f"--out={out}", *config]) == 0
    assert "normalized by the paper's constants, of a VAE that is not recorded" in capsys.readouterr().out
    assert mp.generate(out, [1], steps=1, vae=vae)[0].size == (32, 32)
    space = read_dataset_info(out).latents
    assert (space.mean, space.std) == (PAPER_MEAN, PAPER_STD)
    data = array_source(np.zeros((2, 8, 8, 4), np.float32), np.arange(2), ("a", "b"))
    other = dataclasses.replace(space, std=(1.0,) * 4, vae_fingerprint="ab" * 32)
    with pytest.raises(CheckpointError, match="was trained on latents of another VAE or normalization"):
        record_dataset(out, dataclasses.replace(data, latents=other), trained=True)
    found = dataclasses.replace(space, vae_fingerprint="ab" * 32)
    record_dataset(out, dataclasses.replace(data, latents=found), trained=True)
    assert read_dataset_info(out).latents == found


@pytest.mark.slow
@pytest.mark.usefixtures("no_sums")
def test_nothing_is_assumed_of_other_latents(tmp_path, capsys):
    from mpdit_jax.interop.native_files import save_native

    save_native(tmp_path / "model.safetensors", random_model(in_channels=2), 1)
    assert convert.main([f"--source={tmp_path}/model.safetensors", f"--out={tmp_path / 'run'}"]) == 0
    assert "its latents cannot be decoded" in capsys.readouterr().out
    with pytest.raises(mp.MPDiTError, match="does not record how its latents are normalized"):
        make_decode(str(tmp_path / "run"), "some/vae")


@pytest.mark.slow
def test_a_model_without_a_null_class_stays_one(tmp_path):
    """Its run has no label dropout, and a config with label dropout is refused."""
    from mpdit_jax.convert.checksum import checksum
    from mpdit_jax.interop.native_files import save_native

    model, own, run = random_model(null_class=False, in_channels=1), tmp_path / "own.safetensors", tmp_path / "run"
    save_native(own, model, 1)
    assert convert.main([f"--source={own}", f"--out={run}"]) == 0
    assert not mp.load_checkpoint(run).config.null_class
    assert load_config(run).label_dropout == 0
    message = refusal_of(f"--source={own}", f"--out={tmp_path / 'other'}", "--config=digits")
    assert "null_class=True (the file: False)" in message
    assert "config.label_dropout decides null_class" in message
    # The published names have no row for the null class, and a check sum compares none.
    published = mp.to_torch(model)
    assert len(published["y_embedder.embedding_table.weight"]) == 3
    assert checksum(mp.load_torch(published, num_heads=2, num_classes=3)) == checksum(model)


def refusal_of(*arguments):
    from mpdit_jax.errors import MPDiTError

    with pytest.raises(MPDiTError) as error:
        convert.main(list(arguments))
    return str(error.value)


def test_nothing_is_overwritten(golden, tmp_path):
    source = f"--source={golden[0]}"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (tmp_path / "there.safetensors").write_text("mine")
    assert "a run is never overwritten" in refusal_of(source, f"--out={run}")
    assert "exists: choose another --out" in refusal_of(source, f"--out={tmp_path / 'there.safetensors'}")
    assert "expected .safetensors, .pt or .pth" in refusal_of(source, f"--out={tmp_path / 'model.npz'}")
    assert (run / "config.json").read_text() == "{}"
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def test_what_cannot_be_read(golden, tmp_path, monkeypatch, capsys):
    out = f"--out={tmp_path / 'out.safetensors'}"
    message = refusal(convert.main, [f"--source={tmp_path / 'none.pt'}", out], monkeypatch, capsys)
    assert "none.pt: no such file" in message
    (tmp_path / "empty").mkdir()
    assert "holds no run" in refusal_of(f"--source={tmp_path / 'empty'}", out)
    assert "is no workdir and has no steps" in refusal_of(f"--source={golden[0]}", out, "--step=3")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(golden[0].read_bytes()[:-100])
    assert "damaged.safetensors is not a readable safetensors file" in refusal_of(f"--source={damaged}", out)
    assert not (tmp_path / "out.safetensors").exists()


def test_one_of_ours_that_is_damaged(tmp_path):
    import safetensors.numpy

    from mpdit_jax.interop.native_files import save_native

    model = random_model()
    path = tmp_path / "model.safetensors"
    save_native(path, model, 1)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    arrays["final.bias"] = arrays["final.bias"][:-1]
    arrays["final.kernel"] = np.full_like(arrays["final.kernel"], np.nan)
    safetensors.numpy.save_file(arrays, path, metadata)
    with pytest.raises(mp.MPDiTError, match=r"misshapen: final\.bias is .*; not finite: final\.kernel\."):
        mp.load_torch(path)
    safetensors.numpy.save_file(arrays, path, {**metadata, "model": '{"depth": 3}'})
    with pytest.raises(mp.MPDiTError, match=r"hold no model config of this version .unknown model field 'depth'"):
        mp.load_torch(path)


@pytest.mark.parity
def test_a_pickle_that_carries_code_is_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch")

    class Trap:
        def __reduce__(self):
            return (eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    path = tmp_path / "trap.pt"
    torch.save({"ema": Trap()}, path)
    message = refusal_of(f"--source={path}", f"--out={tmp_path / 'out.safetensors'}")
    assert "trap.pt holds more than tensors (eval) and was not loaded, since it could run code" in message
    assert not (tmp_path / "ran").exists()


def test_a_dit_is_no_run(tmp_path):
    from mpdit_jax.interop.native_files import save_native

    sit = tmp_path / "sit.safetensors"
    save_native(sit, random_model(**DIT, convention="sit"), 1)
    message = refusal_of(f"--source={sit}", f"--out={tmp_path / 'run'}")
    assert "with the convention 'sit' cannot be trained here" in message
    assert "docs/weights.md" in message
    refused = pytest.raises(CheckpointError, match=r"sit\.safetensors is a file, and .+docs/weights\.md shows how")
    with refused:
        sample.main([f"--workdir={sit}", f"--out={tmp_path / 'out.png'}"])
    with refused:
        export.main([f"--workdir={sit}", f"--out={tmp_path / 'out.bin'}"])
    with refused:
        evaluate.main([f"--workdir={sit}", f"--out={tmp_path / 'out.json'}"])


@pytest.mark.parity
def test_what_is_predicted_is_never_lost(tmp_path, capsys):
    """Files record convention and heads, so that they need not be given again and cannot be contradicted."""
    pytest.importorskip("torch")
    import safetensors.numpy

    published, named, own = tmp_path / "sit.safetensors", tmp_path / "sit.pt", tmp_path / "own.safetensors"
    safetensors.numpy.save_file(mp.to_torch(random_model(**DIT)), published)
    assert "say which by convention=" in refusal_of(f"--source={published}", f"--out={named}", "--num_heads=4")
    assert convert.main([f"--source={published}", f"--out={named}", "--convention=sit", "--num_heads=4"]) == 0
    assert convert.main([f"--source={named}", f"--out={own}"]) == 0
    assert "sit.pt: mpdit_jax, step 1\n" in capsys.readouterr().out
    config = mp.load_torch(own).config
    assert (config.convention, config.num_heads) == ("sit", 4)
    for file in (named, own):  # what contradicts a file is not ignored
        assert mp.load_torch(file, num_heads=4, convention="sit").config == config
        for asked in ("convention='dit'", "num_heads=7"):
            message = refusal_of(f"--source={file}", f"--out={tmp_path / 'no.pt'}", f"--{asked.replace(chr(39), '')}")
            assert f"{asked}: {file} records" in message
        with pytest.raises(mp.MPDiTError, match=r"key='model': .* has no such state dict"):
            mp.load_torch(file, key="model")
        with pytest.raises(mp.MPDiTError, match="convention='nonsense': expected one of velocity, sit, dit"):
            mp.load_torch(file, convention="nonsense")


@pytest.mark.slow
@pytest.mark.parity
def test_a_dit_of_ours_becomes_a_run_of_its_config(tmp_path, capsys):
    """A DiT's file without metadata becomes a run of the given config, which records heads and convention."""
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(array) for name, array in mp.to_torch(random_model(**DIT)).items()}
    torch.save(state, tmp_path / "dit.pt")
    config = ["--config=ablation:dit_b_2", "--config.model.depths=1"]
    config += ["--config.model.input_size=8", *(f"--config.model.{name}={TINY[name]}" for name in SIZES)]
    source, out = f"--source={tmp_path / 'dit.pt'}", f"--out={tmp_path / 'run.v1.0'}"  # .0 is no ending
    asked = ["--convention=velocity", "--num_heads=2"]
    assert convert.main([source, out, *asked, *config]) == 0
    assert "config is of a run, and" in refusal_of(source, f"--out={tmp_path / 'x.pt'}", *asked, *config)
    capsys.readouterr()
    run, out = f"--source={tmp_path / 'run.v1.0'}", f"--out={tmp_path / 'x.safetensors'}"
    assert "num_heads=3: " in refusal_of(run, out, "--num_heads=3")
    assert "convention='dit': " in refusal_of(run, out, "--convention=dit")
    # A newest checkpoint that is damaged is not the one that is read.
    checkpoints = tmp_path / "run.v1.0" / "checkpoints"
    shutil.copytree(checkpoints / "1", checkpoints / "9")
    with pytest.warns(DamageWarning, match="step 1 is used"):
        assert convert.main([run, out]) == 0
    assert "moving average of step 1\n" in capsys.readouterr().out
    assert convert.main([f"--source={tmp_path / 'x.safetensors'}", f"--out={tmp_path / 'y.safetensors'}"]) == 0
    assert "x.safetensors: mpdit_jax, step 1\n" in capsys.readouterr().out


def test_a_model_for_another_machine_is_the_same_model(tmp_path, capsys, monkeypatch):
    """A model for another platform has the same checksum. A file that reads back differently is not kept."""
    from mpdit_jax.convert import forms
    from mpdit_jax.interop.native_files import save_native

    save_native(tmp_path / "gpu.safetensors", random_model(platform="gpu", dtype="bfloat16"), 3)
    source, out = f"--source={tmp_path / 'gpu.safetensors'}", tmp_path / "out.safetensors"
    gpu, plain = vars(random_model(platform="gpu").config), vars(random_model().config)
    assert {name for name in gpu if gpu[name] != plain[name]} == {"platform"} & {*forms._RUNTIME_FIELDS}
    assert convert.main([source, f"--out={out}"]) == 0
    assert mp.load_torch(out).config.platform == "gpu"
    out.unlink()
    monkeypatch.setattr(forms, "save_native", lambda path, model, *more: save_native(path, changed(model), *more))
    assert "would be another model than its source" in refusal_of(source, f"--out={out}")
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.safetensors"]


def changed(model, name="class_embedding.table"):
    """Return the model with another value of a class that the checksum's forward pass does not read."""
    structure, parameters = split(model)
    place = (1,) + (0,) * (parameters[name].ndim - 1)
    return merge(structure, {**parameters, name: parameters[name].at[place].add(1.0)})


def test_a_check_sum_is_of_every_parameter():
    """It covers classes that the forward pass does not read, and models whose output is zero."""
    from mpdit_jax.convert.checksum import checksum

    model = random_model()
    structure, parameters = split(model)
    dark = [merge(structure, {**parameters, "final.kernel": parameters["final.kernel"] * 0,
                              "final.bias": parameters["final.bias"] * 0})]  # fmt: skip
    for one in (model, *dark):
        before, after = checksum(one), checksum(changed(one))
        assert before == checksum(one)
        assert before.forward == after.forward
        assert before.parameters != after.parameters


@pytest.mark.parametrize(("step", "expected"), [("7", 7), ("7²", None), ("", None), ("-1", None), ("9" * 5000, None)])
def test_a_step_that_is_none(step, expected):
    from mpdit_jax.interop.native_files import stored_step

    assert stored_step({"step": step}) == expected
