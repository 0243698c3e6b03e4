"""The benchmark, written by hand: `python -m llamabook bench`.

Each mode runs in a process of its own, all loaded before the first is timed, then in rotation, so that a change in
the machine's speed meets all of them. Beside each timed run stands how fast the same process reads the memory of its
weights, which is the limit of decoding. Prefill and decoding are timed apart.

- `job`: what is measured, on which shape
- `worker`: one mode in its process
- `rotation`: the processes, in turn
- `report`: rows, the table, the JSON and the figure
- `draft`, `draft_report`: what a draft is worth, `python -m llamabook draft-eval`; all in one process, to be alike
- `texts`: what a draft is measured on
- `micro`: our kernels against torch's operators, alone
"""
