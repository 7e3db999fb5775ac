"""What is measured of a finished network after training: as it is, with rounded weights, with noise, and fine-tuned.

All but the fine-tuned one have batch-norm statistics made anew; ``fresh`` is what these alone give.
"""

BITS = (8, 4, 3, 2)
NOISE = (0.2, 0.4, 0.8)
# Name in files, and what it is called in tables.
AFTER = {
    "fresh": "fresh statistics",
    **{f"rounded_{bits}": f"{bits} bits" for bits in BITS},
    **{f"noise_{level}": f"noise {level}" for level in NOISE},
    "tuned_original": "tuned, original",
    "tuned_shifted": "tuned, shifted",
}
