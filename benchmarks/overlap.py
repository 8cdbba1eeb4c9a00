"""How fast samples and validation tokens are found in many training tokens, and in what memory.

    python benchmarks/overlap.py --train 1e9 --validation 8e6

The tokens are random, with frequencies like those of words; a tenth of the validation tokens is
copied from the training tokens, in pieces of 1,000. The shards take two bytes for each token.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from results import Results, carry_out, parser

from gptsmith.data.longest_match import longest_matches
from gptsmith.data.overlap import NOWHERE, PART, places_of_grams
from gptsmith.data.shards import TokenStream
from gptsmith.data.tokenfile import ShardWriter
from gptsmith.machine.environment import peak_memory

VOCAB_SIZE, PIECE, AT_ONCE = 50_257, 1000, 1_000_000


def write(folder: Path, name: str, count: int, copied: TokenStream | None) -> TokenStream:
    """Write shards of random tokens; of every ten pieces one is `copied` from a stream."""
    draw = np.random.default_rng(0 if copied is None else 1)
    with ShardWriter(folder, name, VOCAB_SIZE, 100_000_000) as writer:
        for start in range(0, count, AT_ONCE):
            tokens = VOCAB_SIZE ** draw.random(min(AT_ONCE, count - start))
            tokens = tokens.astype(np.int64)
            for i in range(0, len(tokens) - PIECE if copied else 0, 10 * PIECE):
                place = int(draw.integers(0, len(copied or ()) - PIECE))
                tokens[i : i + PIECE] = copied.read(place, place + PIECE) if copied else 0
            writer.write(tokens)
    return TokenStream([folder / shard["file"] for shard in writer.shards])


def main() -> None:
    """Write the tokens, and look for them."""
    known = parser(__doc__)
    known.add_argument("--train", type=float, default=1e8, help="training tokens (default: 1e8)")
    known.add_argument("--validation", type=float, default=1e6, help="of validation (1e6)")
    options = known.parse_args()
    results = Results(options.out)
    with tempfile.TemporaryDirectory() as name:
        train = write(Path(name), "train", int(options.train), None)
        validation = write(Path(name), "validation", int(options.validation), train)
        draws = np.linspace(0, len(validation) - 200, 40).astype(int).tolist()
        samples = [validation.read(start, start + 200) for start in draws]
        passes = -(-len(validation) // PART)
        before = peak_memory()

        def report(what: str, started: float, passes: int, found: int) -> None:
            seconds = time.perf_counter() - started
            row = {"what": what, "seconds": seconds, "passes": passes, "found": found}
            results.add({**row, "peak": peak_memory(), "peak_before": before})
            print(
                f"{what}: {seconds:.1f} s, {passes * len(train) / seconds / 1e6:.1f} million "
                f"tokens/s, {found:,} found, {peak_memory() / 1e9:.2f} GB at most",
                flush=True,
            )

        started = time.perf_counter()
        matches = longest_matches(samples, train)
        report("40 longest matches", started, 1, sum(match.length > 50 for match in matches))
        for n in (13, 50):
            started = time.perf_counter()
            parts = places_of_grams(validation, train, n)
            found = sum(int((places != NOWHERE).sum()) for _, places in parts)
            report(f"{n}-grams", started, passes, found)


if __name__ == "__main__":
    carry_out(main)
