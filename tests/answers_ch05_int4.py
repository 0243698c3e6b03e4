"""Answers to chapter 5's exercises on int4: known wrong ones (test_exercises.py says how to read them), right ones."""

import torch

MUTANTS = {
    "signed_nibbles": [
        ("[packed >> 4, packed & 15]", "[packed & 15, packed >> 4]", "in the high nibble"),
        ("    return torch.where(nibbles > 7, nibbles - 16, nibbles)", "    return nibbles", "mean 16 less"),
        ("    return torch.where(nibbles > 7, nibbles - 16, nibbles)", "    return nibbles - 8", "not raised by 8"),
        ("nibbles > 7", "nibbles > 8", "mean 16 less|7, -8, -1, 0"),
        ("nibbles - 16", "nibbles - 15", "7, -8, -1, 0"),
        ("nibbles - 16", "8 - nibbles", "7, -8, -1, 0"),
        ("[:, :K]", "", "only fills a byte"),
        (
            "torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)",
            "torch.cat([packed >> 4, packed & 15], dim=1)",
            "Neighbours belong together",
        ),
        (".to(torch.int8)\n", ".to(torch.int32)\n", "signed bytes"),
        ("torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)", "(packed >> 4)", "two codes in a byte"),
    ],
    "search_scale": [
        ("/ -8", "/ 7", "becomes -8|one needs a negative scale"),
        ("/ -8", "/ 8", "one needs a negative scale"),
        (
            "groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))",
            "groups.abs().amax(dim=-1, keepdim=True)",
            "one of the candidates",
        ),
        (".argmin(dim=-1, keepdim=True)", ".argmax(dim=-1, keepdim=True)", "the worst of all"),
        (".clamp(-8, 7)", "", "what is cut off counts"),
        (".pow(2)", ".abs()", "sum of squares"),
        (
            "    best = (back - wide).pow(2).sum(dim=-1)",
            "    losses = (back - wide).pow(2).sum(dim=(1, 3))[:, None]  # of a row\n"
            "    best = losses.expand(-1, groups.shape[1], -1)",
            "for each group by itself",
        ),
        ("argmin(dim=-1, keepdim=True)", "argmin(dim=-1, keepdim=True) * 0", "Is there a search"),
        ("    scales = torch.where(largest == 0, 1.0, scales)\n", "", "of zeros has the scale 1"),
        ("[..., 0]\n", "\n", "Want (N, groups)"),
        (".argmin(dim=-1, keepdim=True)", ".flip(-1).argmin(-1, True).mul(-1).add(len(shares) - 1)", "take the first"),
        (".sum(dim=-1)", ".amax(dim=-1)", "sum of squares"),
        ("clamp(-8, 7)", "clamp(-7, 7)", "squared error|take the first"),
    ],
    "product_in_groups": [
        ("* scales[:, i]", "* scales[:, 0]", "a scale of its own"),
        ("* scales[:, i]", "* scales.mean(dim=1)", "a scale of its own"),
        ("part.sum(dim=1, keepdim=True) * zeros", "zeros", "once for every column"),
        ("            y += part.sum(dim=1, keepdim=True) * zeros[:, i]\n", "            pass\n", "Where are the zeros"),
        ("* zeros[:, i]", "* zeros[:, i] * scales[:, i]", "numbers already"),
        ("            y += part", "            y -= part", "not taken away"),
        ("part.sum(dim=1, keepdim=True)", "x.sum(dim=1, keepdim=True)", "the same with zeros"),
        ("        y += (part", "        y = (part", "30 - 100"),
        (
            "    y = x.new_zeros(len(x), len(codes))\n",
            "    groups = torch.arange(codes.shape[1]) // g\n"
            "    weight = codes * scales[:, groups] + (0 if zeros is None else zeros[:, groups])\n"
            "    return x @ weight.T\n",
            "never be written out",
        ),
        ("    for i, (part", "    codes = codes.float()\n    for i, (part", "never be written out"),
        ("    return y", "    return y.T", "Rows are tokens"),
        ("    return y", "    return y.double()", "want float32"),
        ("codes.split(g, dim=1)", "codes.split(g, dim=1)[: codes.shape[1] // g]", "last group has 4"),
    ],
}  # fmt: skip


def by_shifting(packed, K):
    signed = packed.view(torch.int8)
    pairs = torch.stack([signed >> 4, signed << 4 >> 4], dim=2)  # the sign is shifted in
    return pairs.reshape(len(packed), -1)[:, :K]


def by_remembering(groups, shares):
    first = torch.where(groups.amax(-1) >= -groups.amin(-1), groups.amax(-1), groups.amin(-1)) / -8
    best, least = torch.ones_like(first), torch.full_like(first, torch.inf)
    for share in shares:
        scale = (first * share)[..., None]
        loss = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(-1)
        best, least = torch.where(loss < least, scale[..., 0], best), torch.minimum(loss, least)
    return best


def by_rows(x, codes, scales, zeros, g):
    columns = torch.arange(codes.shape[1]) // g
    rows = []
    for n, code in enumerate(codes):
        weight = code * scales[n, columns]
        rows.append(x @ (weight if zeros is None else weight + zeros[n, columns]))
    return torch.stack(rows, dim=1)


OTHERS = {"signed_nibbles": by_shifting, "search_scale": by_remembering, "product_in_groups": by_rows}
