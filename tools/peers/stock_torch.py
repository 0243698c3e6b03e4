#!/usr/bin/env python3
"""The engine on torch's own operators, as a guest in the benchmark's rotation: what our kernels gain, and nothing else.

    python -m llamabook bench --shape llama3.2-1b --modes static,static_compiled \\
        --peer "stock=python tools/peers/stock_torch.py" --peer "stock_compiled=python tools/peers/stock_torch.py"

--precision int8 or int4 quantizes the weights, for torch's operators for those.
"""

import argparse

from torch.nn import functional as F

from llamabook.bench import worker
from llamabook.bench.job import PRECISIONS
from llamabook.fast import kernels
from llamabook.fast.attention import grouped_attention
from llamabook.fast.quantize import packing


class Stock(worker.Static):
    """The mode `static` with F.linear, and with attention as two matrix products."""

    asked = None  # what the flag below can change

    def make(self):
        self.precision = self.asked
        kernels.linear, kernels.decode_attention = F.linear, grouped_attention
        packing.Blocks.takes = lambda weight: False
        kernels.takes_layer = lambda *tensors: False
        return super().make()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", dest="asked", choices=PRECISIONS, help="quantize the weights")
    parser.parse_args(namespace=Stock)
    worker.main(Stock)
