"""TensorFlow writes again what tests/convert reads without it: the same bytes."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.convert.test_tensorflow import ARRAYS, WRITTEN

pytestmark = pytest.mark.clients
CLIENT = Path(sys.prefix) / "clients" / "tensorflow"  # `make clients` installs it there
WRITE = """
import sys
import numpy
import tensorflow
from pathlib import Path

v1, out = tensorflow.compat.v1, Path(sys.argv[2])
v1.disable_eager_execution()
arrays = dict(numpy.load(sys.argv[1]))

def save(name, make, sharded=False, **more):
    folder = out / name
    folder.mkdir()
    with tensorflow.Graph().as_default():
        step = make()
        with v1.Session(config=v1.ConfigProto(device_count={"CPU": 2})) as session:
            session.run(v1.global_variables_initializer())
            if step is not None:
                session.run(step)
                kept = {v.op.name: session.run(v) for v in v1.global_variables()}
                numpy.savez(out / f"{name}.npz", **kept)
            v1.train.Saver(sharded=sharded).save(session, str(folder / "model.ckpt"), **more)

def weights(dtype=None, partitioner=None, device=lambda number: "/cpu:0"):
    for number, (name, array) in enumerate(arrays.items()):
        with v1.device(device(number)):
            start = array.astype(dtype or array.dtype)
            if partitioner and name == "model/wte":
                v1.get_variable(name, start.shape, partitioner=partitioner)
            else:
                v1.get_variable(name, initializer=start)

def trained():
    weights()
    loss = sum(v1.reduce_sum(v * v) for v in v1.trainable_variables())
    step = v1.train.get_or_create_global_step()
    return v1.train.AdamOptimizer(0.01).minimize(loss, global_step=step)

save("plain", weights)
save("half", lambda: weights(dtype="float16"))
save("sliced", lambda: weights(partitioner=v1.fixed_size_partitioner(2)))
save("shards", lambda: weights(device=lambda number: f"/cpu:{number % 2}"), sharded=True)
save("trained", trained, global_step=70)
names = [f"{number * 7919 % 3000:04} " + 400 * chr(97 + number % 26) for number in range(3000)]
(out / "large").mkdir()
save_v2 = v1.raw_ops.SaveV2(
    prefix=str(out / "large" / "model.ckpt"),
    tensor_names=names,
    shape_and_slices=[""] * len(names),
    tensors=[numpy.float32(number) for number in range(len(names))],
)
v1.Session().run(save_v2)
"""


def test_it_writes_what_is_kept(tmp_path: Path) -> None:
    """But for the slices, whose variable begins with random numbers."""
    assert CLIENT.is_dir(), "the client is missing: `make clients` installs it"
    np.savez(tmp_path / "arrays.npz", **ARRAYS)
    done = subprocess.run(
        [CLIENT / "bin" / "python", "-c", WRITE, tmp_path / "arrays.npz", tmp_path],
        capture_output=True,
        text=True,
        env={"TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(WRITTEN) as packed:
        kept = {name: packed.read(name) for name in packed.namelist()}
    paths = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("model.ckpt*")}
    written = {name: path.read_bytes() for name, path in paths.items() if path.suffix != ".meta"}
    assert len(written) == 13
    for name, data in written.items():
        if not name.startswith("sliced/"):
            assert data == kept[name], name
