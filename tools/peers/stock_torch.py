#!/usr/bin/env python3
"""The engine on torch's own operators, as a guest in the benchmark's rotation: what our kernels gain, and nothing else.

    python -m llamabook bench --shape llama3.2-1b --modes static,static_compiled \\
        --peer "stock=python tools/peers/stock_torch.py" --peer "stock_compiled=python tools/peers/stock_torch.py"
"""

from torch.nn import functional as F

from llamabook.bench import worker
from llamabook.fast import kernels
from llamabook.fast.attention import grouped_attention


class Stock(worker.Static):
    """The mode `static` with F.linear, and with attention as two matrix products."""

    def make(self):
        kernels.linear, kernels.decode_attention = F.linear, grouped_attention
        kernels.takes_layer = lambda *tensors: False
        return super().make()


if __name__ == "__main__":
    worker.main(Stock)
