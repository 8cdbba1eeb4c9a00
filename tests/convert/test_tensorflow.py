"""OpenAI's TensorFlow folder: TensorFlow writes it, we read it without, and damage is found."""

import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from google_crc32c import value as crc32c

from gptsmith import GPTConfig, generate_greedy
from gptsmith.checkpoint.building import build
from gptsmith.convert import tensorflow
from gptsmith.convert.bundle import Variable, checksum, open_bundle
from gptsmith.machine.files import DamagedError
from gptsmith.tokenizers import gpt2_tokenizer
from gptsmith.tokenizers.build import places_of_gpt2
from tests.conftest import TINY

HPARAMS = {"n_vocab": 37, "n_ctx": 11, "n_embd": 12, "n_head": 3, "n_layer": 2}


def toy_arrays(vocab: int = 37) -> dict[str, np.ndarray]:
    """Every variable of OpenAI's code, with its shapes, random and large."""
    generator = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"wte": (vocab, 12), "wpe": (11, 12)}
    shapes |= {"ln_f/g": (12,), "ln_f/b": (12,)}
    for layer in ("h0", "h1"):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{layer}/{norm}/g": (12,), f"{layer}/{norm}/b": (12,)}
        wide = {"attn/c_attn": (12, 36), "attn/c_proj": (12, 12)}
        wide |= {"mlp/c_fc": (12, 48), "mlp/c_proj": (48, 12)}
        for name, (ins, outs) in wide.items():
            shapes |= {f"{layer}/{name}/w": (1, ins, outs), f"{layer}/{name}/b": (outs,)}
    return {
        f"model/{name}": (generator.standard_normal(shape) * 0.3).astype(np.float32)
        for name, shape in shapes.items()
    }


ARRAYS = toy_arrays()


def reference(
    arrays: dict[str, np.ndarray], config: dict[str, int]
) -> transformers.GPT2LMHeadModel:
    """Hugging Face's GPT-2 with the same weights, each put in its place by name."""
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config["n_vocab"],
            n_positions=config["n_ctx"],
            n_embd=config["n_embd"],
            n_head=config["n_head"],
            n_layer=config["n_layer"],
        )
    ).eval()
    parameters, loaded = dict(model.named_parameters()), set()
    for name, array in arrays.items():
        *path, leaf = name.removeprefix("model/").split("/")
        if path and path[0] in ("h0", "h1"):
            path[:1] = ["h", path[0][1:]]
        last = {"w": ["weight"], "g": ["weight"], "b": ["bias"]}.get(leaf, [leaf, "weight"])
        place = ".".join(["transformer", *path, *last])
        with torch.no_grad():  # Conv1D keeps matrices (in, out), as OpenAI's code does
            parameters[place].copy_(torch.from_numpy(array.squeeze(0) if leaf == "w" else array))
        loaded.add(place)
    assert loaded == set(parameters)
    return model


def assert_equal_models(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Our model of a folder computes what Hugging Face's does with the same arrays."""
    stored = tensorflow.read(folder)
    model = build(stored)
    theirs = reference(arrays, json.loads((folder / "hparams.json").read_text()))
    tokens = torch.randint(37, (2, 5), generator=torch.Generator().manual_seed(2))
    assert (theirs(tokens).logits - model(tokens).logits).abs().max() < 1e-4
    greedy = theirs.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert greedy.tolist() == generate_greedy(model, tokens, 6).tolist()


# -- what TensorFlow writes

# Folders by TensorFlow 2.21, without their graphs; tests/clients/test_tensorflow.py writes them.
WRITTEN = Path(__file__).with_name("tensorflow.zip")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints by TensorFlow itself."""
    out = tmp_path_factory.mktemp("tensorflow")
    with zipfile.ZipFile(WRITTEN) as packed:
        packed.extractall(out)
    for folder in out.iterdir():
        if folder.is_dir():
            (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    return out


@pytest.mark.slow
def test_we_read_what_tensorflow_saves(written: Path) -> None:
    folder = written / "plain"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint",
        "hparams.json",
        "model.ckpt.data-00000-of-00001",
        "model.ckpt.index",
    }
    assert tensorflow.recognise(folder)
    bundle = open_bundle(folder / "model.ckpt.index")
    assert bundle.variables.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.array_equal(bundle.read(name), array), name
    stored = tensorflow.read(folder)
    assert stored.config == GPTConfig(**TINY)
    assert stored.dtype == "float32"
    assert stored.tokenizer is None
    assert stored.tensors.ignored == {}
    assert stored.tensors.read.keys() == ARRAYS.keys()
    assert_equal_models(folder, ARRAYS)


@pytest.mark.slow
def test_a_checkpoint_in_two_files_is_read(written: Path) -> None:
    files = {path.name for path in (written / "shards").glob("*.data-*")}
    assert files == {"model.ckpt.data-00000-of-00002", "model.ckpt.data-00001-of-00002"}
    assert_equal_models(written / "shards", ARRAYS)


@pytest.mark.slow
def test_what_belongs_to_the_optimizer_is_left_out(written: Path) -> None:
    kept = dict(np.load(written / "trained.npz"))
    weights = {name: kept[name] for name in ARRAYS}
    assert not np.array_equal(weights["model/wte"], ARRAYS["model/wte"])
    stored = tensorflow.read(written / "trained")
    assert stored.tensors.ignored.keys() == kept.keys() - ARRAYS.keys()
    assert len(stored.tensors.ignored) == 2 * len(ARRAYS) + 3
    assert_equal_models(written / "trained", weights)


@pytest.mark.slow
def test_an_index_of_many_blocks_is_read(written: Path) -> None:
    index = written / "large" / "model.ckpt.index"
    assert index.stat().st_size > 4 * 262_144  # bytes, where TensorFlow begins another block
    bundle = open_bundle(index)
    assert len(bundle.variables) == 3000
    for number in (0, 1, 1500, 2999):
        name = f"{number * 7919 % 3000:04} " + 400 * chr(97 + number % 26)
        assert bundle.read(name) == number


@pytest.mark.slow
def test_what_no_gpt2_was_saved_as_is_refused(written: Path) -> None:
    with pytest.raises(ValueError, match=r"model/wte is stored in slices: save it whole$"):
        tensorflow.read(written / "sliced")
    with pytest.raises(ValueError, match=r"index: model/\S+ is float16, but float32 is needed$"):
        tensorflow.read(written / "half")


# An index that TensorFlow 2.21 wrote: h0/w, (1, 4, 12) of ones, and wte, (3, 4) of 0 to 11.
BY_TENSORFLOW = """
00000608011a020801000a186d6f64656c2f68302f770801120c12020801120208041202080c28c00135cbbdc069
06031677746508011208120208031202080420c001283035d7a655dc0000000001000000001582c4c90000000001
00000000c0f2a1b00001026e0052000000000100000000c1f0fea95708640e000000000000000000000000000000
00000000000000000000000000000000000000000057fb808b247547db
"""


def test_an_index_by_tensorflow_is_read_without_it(tmp_path: Path) -> None:
    numbers = {
        "model/h0/w": np.ones((1, 4, 12), np.float32),
        "model/wte": np.arange(12, dtype=np.float32).reshape(3, 4),
    }
    index = tmp_path / "model.ckpt.index"
    index.write_bytes(bytes.fromhex(BY_TENSORFLOW))
    data = b"".join(array.tobytes() for array in numbers.values())
    (tmp_path / "model.ckpt.data-00000-of-00001").write_bytes(data)
    bundle = open_bundle(index)
    assert bundle.variables.keys() == numbers.keys()
    for name, array in numbers.items():
        assert np.array_equal(bundle.read(name), array)


# -- the checksum


def shifted(state: int) -> int:
    """A checksum's state after one more byte of zeros, bit by bit, as RFC 3720 defines it."""
    for _ in range(8):
        state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state


SHIFTED = [shifted(byte) for byte in range(256)]


def slow_crc32c(data: bytes) -> int:
    """Byte by byte."""
    state = 0xFFFFFFFF
    for byte in data:
        state = state >> 8 ^ SHIFTED[(state ^ byte) & 0xFF]
    return state ^ 0xFFFFFFFF


def test_the_checksum_is_that_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # these four: RFC 3720, B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C


@pytest.mark.parametrize("size", [*range(20), 63, 64, 1000, 1023, 1024, 1025, 4093])
def test_the_checksum_is_that_of_every_byte(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == slow_crc32c(data)
    assert checksum(data).to_bytes(4, "little") == masked(data)


def test_the_checksum_of_an_array_is_that_of_its_bytes() -> None:
    array = np.random.default_rng(1).standard_normal((7, 9)).astype(np.float32)
    assert checksum(array).to_bytes(4, "little") == masked(array.tobytes())


# -- a writer of our own, for what TensorFlow never writes


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def masked(data: bytes) -> bytes:
    checksum = slow_crc32c(data)
    rotated = checksum >> 15 | checksum << 17
    return (rotated + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")


def entry(array: np.ndarray, start: int, **changes: Any) -> bytes:
    """A BundleEntryProto; `changes` replace dtype, shard, offset, size, or add slices."""
    says = {"dtype": 1, "shard": 0, "offset": start, "size": array.nbytes} | changes
    shape = b"".join(field(2, field(1, size)) for size in array.shape)
    message = field(1, says["dtype"]) + field(2, shape) + field(3, says["shard"])
    message += field(4, says["offset"]) + field(5, says["size"])
    message += varint(6 << 3 | 5) + masked(array.tobytes())
    return message + (field(7, says["slices"]) if "slices" in says else b"")


def block(records: Iterable[tuple[bytes, bytes]], kind: int = 0) -> bytes:
    """A block of a table, where every third key is whole."""
    out, restarts, last = b"", list[int](), b""
    for number, (key, value) in enumerate(records):
        if number % 3 == 0:
            restarts.append(len(out))
            last = b""
        differ = (at for at, pair in enumerate(zip(last, key, strict=False)) if len(set(pair)) > 1)
        shared = next(differ, min(len(last), len(key)))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        last = key
    out += b"".join(start.to_bytes(4, "little") for start in restarts)
    out += len(restarts).to_bytes(4, "little")
    return seal(out, kind)


def seal(contents: bytes, kind: int = 0) -> bytes:
    return contents + bytes([kind]) + masked(contents + bytes([kind]))


def table(blocks: list[bytes], lasts: list[bytes]) -> bytes:
    """Blocks and the index of them: each one's last key and where it is."""
    out, handles = b"", list[bytes]()
    for one in blocks:
        handles.append(varint(len(out)) + varint(len(one) - 5))
        out += one
    footer = b""
    for one in (block([]), block(zip(lasts, handles, strict=True))):
        footer += varint(len(out)) + varint(len(one) - 5)
        out += one
    magic = 0xDB4775248B80FB57.to_bytes(8, "little")
    return out + footer.ljust(40, b"\0") + magic


HEADER = field(1, 1) + field(3, field(1, 1))  # one file, version 1


def write_toy(
    folder: Path,
    arrays: dict[str, np.ndarray] | None = None,
    *,
    header: bytes = HEADER,
    changes: dict[str, dict[str, Any]] | None = None,
    kind: int = 0,
    name: str = "model.ckpt",
) -> Path:
    """A folder as OpenAI's, in two blocks; `changes` by variable go to `entry`."""
    arrays = ARRAYS if arrays is None else arrays
    folder.mkdir(exist_ok=True)
    records, data = [(b"", header)], b""
    for variable in sorted(arrays):
        more = (changes or {}).get(variable, {})
        records.append((variable.encode(), entry(arrays[variable], len(data), **more)))
        data += arrays[variable].tobytes()
    halves = records[:9], records[9:]
    blocks = [block(half, kind) for half in halves]
    index = table(blocks, [half[-1][0] for half in halves if half] or [b""])
    (folder / f"{name}.index").write_bytes(index)
    (folder / f"{name}.data-00000-of-00001").write_bytes(data)
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("made") / "toy")


@pytest.fixture
def toy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "toy"))


def test_a_folder_without_tensorflow(toy: Path) -> None:
    assert tensorflow.recognise(toy)
    assert_equal_models(toy, ARRAYS)


@pytest.mark.slow
def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "toy", ARRAYS | {"model/wte": np.zeros((50257, 12), "<f4")[:99]})
    vocabulary, merges = next(iter(places_of_gpt2()))
    shutil.copy(vocabulary, folder / "encoder.json")
    (folder / "hparams.json").write_text(json.dumps(HPARAMS | {"n_vocab": 99}))
    with pytest.raises(ValueError, match=r"toy has no valid GPT-2 vocabulary: .*vocab\.bpe"):
        tensorflow.read(folder)
    shutil.copy(merges, folder / "vocab.bpe")
    tokenizer = tensorflow.read(folder).tokenizer
    assert tokenizer is not None
    assert tokenizer.fingerprint == gpt2_tokenizer().fingerprint


def test_which_checkpoint_is_read(toy: Path) -> None:
    """As fine-tuning leaves them: several, and a file that names the last, maybe elsewhere."""
    other = {name: array + 1 for name, array in ARRAYS.items()}
    write_toy(toy, other, name="model-70")
    with pytest.raises(
        ValueError, match=r"has model-70.index, model.ckpt.index: name the one to read"
    ):
        tensorflow.read(toy)
    with pytest.raises(ValueError, match="name the one") as caught:
        tensorflow.read(toy)
    (toy / "checkpoint").write_text(str(caught.value).partition(", as in ")[2])
    assert np.array_equal(tensorflow.read(toy).fetch("wpe.weight"), ARRAYS["model/wpe"])
    for said in ("model-70", "/elsewhere/run1/model-70", r"C:\\runs\\model-70"):
        lines = f'model_checkpoint_path: "{said}"\nall_model_checkpoint_paths: "model.ckpt"\n'
        (toy / "checkpoint").write_text(lines)
        fetched = tensorflow.read(toy).fetch("wpe.weight")
        assert np.array_equal(fetched, other["model/wpe"]), said
    (toy / "model-70.index").unlink()
    assert np.array_equal(tensorflow.read(toy).fetch("wpe.weight"), ARRAYS["model/wpe"])


def test_only_such_a_folder_is_recognised(toy: Path, tmp_path: Path) -> None:
    assert not tensorflow.recognise(tmp_path / "nothing")
    assert not tensorflow.recognise(toy / "hparams.json")
    assert not tensorflow.recognise(tmp_path)
    (toy / "model.ckpt.index").write_bytes(b"short")
    assert not tensorflow.recognise(toy)
    (toy / "model.ckpt.index").unlink()
    (toy / "model.ckpt.index").mkdir()
    assert not tensorflow.recognise(toy)


# -- damage


def said_of(index: Path) -> str:
    """The error of reading everything, or "read"; what is neither fails the test."""
    try:
        bundle = open_bundle(index)
        for name in bundle.variables:
            bundle.read(name)
    except (ValueError, OSError) as error:
        return str(error)
    return "read"


def test_an_index_cut_anywhere_is_refused(toy: Path) -> None:
    index = toy / "model.ckpt.index"
    whole = index.read_bytes()
    for size in range(len(whole)):
        index.write_bytes(whole[:size])
        with pytest.raises(DamagedError, match="its end is not a table's") as caught:
            open_bundle(index)
        assert "\n" not in str(caught.value)


def test_a_changed_byte_of_the_index_is_found(toy: Path) -> None:
    """But in the list of other blocks and the footer's padding, of which nothing is read."""
    index = toy / "model.ckpt.index"
    whole, expected = index.read_bytes(), open_bundle(index)
    unread = 0
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        index.write_bytes(changed)
        if said_of(index) == "read":
            assert open_bundle(index) == expected
            unread += 1
    assert unread <= len(block([])) + 40


def test_changed_numbers_are_found_when_read(toy: Path) -> None:
    data = toy / "model.ckpt.data-00000-of-00001"
    numbers = bytearray(data.read_bytes())
    numbers[100] ^= 1
    data.write_bytes(numbers)
    stored = tensorflow.read(toy)  # which reads no tensor
    with pytest.raises(DamagedError, match=r"was changed since it was written: model/h0/attn/c_"):
        build(stored)


def test_names_that_only_look_whole_do_no_harm(toy: Path) -> None:
    """Any bytes at all with right checksums: an error of ours or a checkpoint, at once."""
    index, chance = toy / "model.ckpt.index", random.Random(3)
    arrays = {name: ARRAYS[name] for name in ("model/wpe", "model/wte")}
    records = [(b"", HEADER), *((n.encode(), entry(a, 0)) for n, a in arrays.items())]
    contents = block(records)[:-5]
    outcomes = set[str]()
    for _ in range(1000):
        changed = bytearray(contents)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(changed))] = chance.choice([0, 1, 127, 128, 255])
        index.write_bytes(table([seal(bytes(changed))], [b"model/wte"]))
        said = said_of(index)
        assert "\n" not in said
        outcomes.add(said.partition("checkpoint: ")[2][:12])
    assert len(outcomes) > 8


def test_rubbish_is_refused(toy: Path) -> None:
    index, chance = toy / "model.ckpt.index", random.Random(4)
    magic = index.read_bytes()[-8:]
    for size in range(300):
        index.write_bytes(chance.randbytes(size) + magic)
        with pytest.raises(DamagedError):
            open_bundle(index)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (field(1, 1) + field(2, 1), "its numbers are a big-endian machine's: save it on an ord"),
        (field(1, 1) + field(3, field(1, 9) + field(2, 2)), "it needs a reader of version 2, and"),
        (field(1, 2) + field(3, field(1, 1)), "data-00000-of-00002 is missing, though model.ckpt"),
        (field(3, field(1, 1)), "it says that it has 0 files"),
        (field(1, 1 << 40), "it says that it has 1099511627776 files"),
        (field(1, b"one"), "a message is where a number should be"),
        (field(1, 1) + field(3, 1), "a number is where a message should be"),
        (b"\x0b", "a field is of the unknown kind 3"),
        (b"\x08" + b"\xff" * 10, "a number has more than ten bytes"),
        (b"\x0a\x7f", "it is cut short"),
    ],
)
def test_a_header_that_is_not_understood(header: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        tensorflow.read(write_toy(tmp_path / "toy", header=header))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": 2, "size": 1056}, "model/wpe is float64, but float32 is needed"),
        ({"dtype": 77}, "model/wpe is TensorFlow's data type 77, but float32 is needed"),
        ({"size": 532}, r"model/wpe is \(11, 12\), but has 532 bytes"),
        ({"shard": 1}, "model/wpe is in file 1 of 1"),
        ({"offset": 1 << 62}, r"00001 is cut short: [\d,]+ bytes, but 4,611,.* were written"),
        ({"slices": b""}, "model/wpe is stored in slices: save it whole"),
    ],
)
def test_a_variable_that_is_not_as_it_should_be(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tensorflow.read(write_toy(tmp_path / "toy", changes={"model/wpe": changes}))
    assert "\n" not in str(caught.value)


def test_a_compressed_table_is_refused(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "toy", kind=1)
    with pytest.raises(ValueError, match=r"it is compressed \(kind 1\), which TensorFlow never"):
        tensorflow.read(folder)


def test_names_out_of_order_and_blocks_twice_are_refused(toy: Path) -> None:
    index = toy / "model.ckpt.index"
    one = block([(b"", HEADER), (b"b", entry(ARRAYS["model/wte"], 0))])
    two = block([(b"a", entry(ARRAYS["model/wte"], 0))])
    index.write_bytes(table([one, two], [b"b", b"c"]))
    with pytest.raises(DamagedError, match="its names are out of order"):
        open_bundle(index)
    handle = varint(0) + varint(len(one) - 5)
    directory = block([(b"b", handle), (b"c", handle)])
    footer = handle + varint(len(one)) + varint(len(directory) - 5)
    index.write_bytes(one + directory + footer.ljust(40, b"\0") + index.read_bytes()[-8:])
    with pytest.raises(DamagedError, match="its blocks overlap"):
        open_bundle(index)
    index.write_bytes(table([two], [b"a"]))
    with pytest.raises(DamagedError, match="it does not begin with a header"):
        open_bundle(index)


def test_a_variable_of_no_numbers_is_none_of_ours(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "toy", ARRAYS | {"model/wte": np.zeros((0, 12), np.float32)})
    assert open_bundle(folder / "model.ckpt.index").read("model/wte").shape == (0, 12)
    with pytest.raises(ValueError, match=r"model/wte is \(0, 12\), but hparams.json calls for"):
        tensorflow.read(folder)


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: write_toy(folder, {n: a for n, a in ARRAYS.items() if n != name})


def besides(name: str) -> Callable[[Path], object]:
    return lambda folder: write_toy(folder, ARRAYS | {name: np.ones(3, np.float32)})


def says(**changes: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "hparams.json").write_text(json.dumps(HPARAMS | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model/h1/mlp/c_fc/w"), "lacks 1 tensors of a GPT-2, model/h1/mlp/c_fc/w first"),
        (besides("model/h0/attn/rope"), "has 1 tensors no GPT-2 has, model/h0/attn/rope first"),
        (besides("model/h2/ln_1/g"), "has 3 layers, but hparams.json calls for 2"),
        (besides("Adam"), "has 1 tensors no GPT-2 has, Adam first"),
        (says(n_layer=3), "has 2 layers, but hparams.json calls for 3"),
        (says(n_layer=10**9), "has 2 layers, but hparams.json calls for 1000000000"),
        (says(n_ctx=12), r"model/wpe is \(11, 12\), but hparams.json calls for \(12, 12\)"),
        (says(n_vocab=50257), r"model/wte is \(37, 12\), but hparams.json calls for \(50257, 12"),
        (says(n_embd=24), r"but hparams.json calls for \(37, 24\)"),
        (says(n_head=5), "hparams.json: n_embd 12 is not a multiple of n_head 5"),
        (says(n_embd="12"), "hparams.json: n_embd is '12': a whole number of at least 1"),
        (says(n_layer=-1), "hparams.json: n_layer is -1: a whole number of at least 1"),
        (says(scale_by_depth=True), "has scale_by_depth, which OpenAI's GPT-2 does not know"),
        (lambda f: (f / "hparams.json").write_text("{}"), "lacks n_vocab, n_ctx, n_embd, n_head"),
        (lambda f: (f / "hparams.json").write_text("["), "hparams.json is not valid JSON"),
        (lambda f: (f / "hparams.json").unlink(), "toy has no hparams.json: copy it from"),
        (lambda f: (f / "model.ckpt.index").unlink(), "toy has no .*index of a TensorFlow check"),
        (lambda f: data_of(f).unlink(), "data-00000-of-00001 is missing, though model.ckpt.index"),
        (lambda f: data_of(f).write_bytes(b""), "is cut short: 0 bytes, but [0-9,]+ were written"),
        (lambda f: os.truncate(data_of(f), 9999), "is cut short: 9,999 bytes, but"),
    ],
)
def test_a_folder_that_is_no_gpt2_is_refused(
    toy: Path, change: Callable[[Path], object], message: str
) -> None:
    change(toy)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        tensorflow.read(toy)
    assert "\n" not in str(caught.value)


def test_sizes_are_copied_from_the_original_as_advised(toy: Path, tmp_path: Path) -> None:
    """And a folder with them is imported."""
    original = (toy / "hparams.json").rename(tmp_path / "hparams.json")
    with pytest.raises(FileNotFoundError, match=r"has no (\S+): copy it from the") as caught:
        tensorflow.read(toy)
    name = str(caught.value).partition("has no ")[2].partition(":")[0]
    (toy / name).write_bytes(original.read_bytes())
    assert np.array_equal(tensorflow.read(toy).fetch("wpe.weight"), ARRAYS["model/wpe"])


def data_of(folder: Path) -> Path:
    return folder / "model.ckpt.data-00000-of-00001"


def test_one_tensor_at_a_time(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read before it is asked for, and then nothing else."""
    read = list[tuple[int, int]]()
    real = np.fromfile

    def watched(path: Path, dtype: str, count: int, *, offset: int) -> np.ndarray:
        read.append((offset, count))
        return real(path, dtype, count, offset=offset)

    monkeypatch.setattr(np, "fromfile", watched)
    stored = tensorflow.read(toy)
    assert read == []
    fetched = stored.fetch("h.1.mlp.c_fc.weight")
    assert np.array_equal(fetched, ARRAYS["model/h1/mlp/c_fc/w"][0].T)
    where: Variable = open_bundle(toy / "model.ckpt.index").variables["model/h1/mlp/c_fc/w"]
    assert read == [(where.offset, 12 * 48)]
