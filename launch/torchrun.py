"""torchrun without its own report of a failure, so that the reason which a worker prints is the last line.

    python -m launch.torchrun --nproc_per_node=2 -m launch.pretrain --config configs/quickstart.yaml

Takes torchrun's arguments and runs torchrun; on one machine `--standalone` is understood. A worker that ends without a
word, by a signal for instance, is named.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: list[str] | None = None) -> None:
    """Run the workers; end with the status of the first that failed."""
    given = sys.argv[1:] if argv is None else argv
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    elsewhere = any(word.startswith(("--standalone", "--nnodes", "--rdzv", "--master")) for word in given)
    try:
        run.run(run.parse_args(given if elsewhere else ["--standalone", *given]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if not isinstance(failure.message, dict):  # it left no reason: no error file
            print(f"error: rank {rank}: {failure.message or f'exit status {failure.exitcode}'}", file=sys.stderr)
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode) from None
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None


if __name__ == "__main__":
    main()
