"""python -m mpdit_jax.convert: every form to every other and back, and what it refuses."""

import itertools
import resource
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest

import mpdit_jax as mp
from mpdit_jax import export
from mpdit_jax.convert import __main__ as convert
from mpdit_jax.errors import CheckpointError, DamageWarning
from mpdit_jax.evaluate import __main__ as evaluate
from mpdit_jax.model.parameters import abstract, merge, split
from mpdit_jax.model.presets import preset_config
from mpdit_jax.sample import __main__ as sample
from tests.conftest import Golden
from tests.tiny import TWO_LEVELS, refusal, run, saved_arrays, start, train_arguments

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


@pytest.mark.parametrize("name", ["own.safetensors", pytest.param("named.pt", marks=pytest.mark.parity)])
def test_a_disk_without_room(golden, tmp_path, name):
    """PyTorch tells of it in words of its own."""

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


@pytest.mark.parity
def test_all_the_way_round(golden, tmp_path, capsys):
    """Published file, workdir, our file, PyTorch file, and our file again: the same bits in all of them."""
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
    """What has no published names has our own: also the scaled FNO, whose constants are in the config."""
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


def test_a_run_starts_from_a_converted_workdir(tmp_path, capsys):
    """The step goes on where the file's ended, from its weights, by the config given."""
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
    with pytest.raises(mp.MPDiTError, match=r"not finite: final\.bias, final\.kernel\."):
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
    assert "by the convention 'sit' cannot be trained here" in message
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
    """A SiT of heads that no preset has, into a PyTorch file that says both, and on from there without being asked."""
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
        with pytest.raises(mp.MPDiTError, match="convention='nonsense': expected one of velocity, sit, dit"):
            mp.load_torch(file, convention="nonsense")


@pytest.mark.parity
def test_a_dit_of_ours_becomes_a_run_of_its_config(tmp_path, capsys):
    """From a PyTorch file that does not say what it is, by the config that trains it; and the run knows what it is."""
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
    """It is verified before it takes its place: nothing stays of what is not the same."""
    from mpdit_jax.convert import forms
    from mpdit_jax.interop.native_files import save_native

    save_native(tmp_path / "gpu.safetensors", random_model(platform="gpu", dtype="bfloat16"), 3)
    source, out = f"--source={tmp_path / 'gpu.safetensors'}", tmp_path / "out.safetensors"
    gpu, plain = vars(random_model(platform="gpu").config), vars(random_model().config)
    assert {name for name in gpu if gpu[name] != plain[name]} == {"platform"} & {*forms._RUNTIME_FIELDS}
    assert convert.main([source, f"--out={out}"]) == 0
    assert mp.load_torch(out).config.platform == "gpu"
    out.unlink()
    monkeypatch.setattr(forms, "save_native", lambda path, model, step: save_native(path, changed(model), step))
    assert "would be another model than its source" in refusal_of(source, f"--out={out}")
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.safetensors"]


def changed(model, name="class_embedding.table"):
    """That model with one entry of one parameter another, of a class that no check sum's forward pass sees."""
    structure, parameters = split(model)
    place = (1,) + (0,) * (parameters[name].ndim - 1)
    return merge(structure, {**parameters, name: parameters[name].at[place].add(1.0)})


def test_a_check_sum_is_of_every_parameter():
    """Also of the rows of other classes, and of a model that computes nothing yet."""
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
