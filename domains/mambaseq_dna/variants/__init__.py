"""Effects of variants by a model: of those in a file (`scoring.score_variants`), and of every substitution in a region
(`mutagenesis.mutagenesis`)."""

OTHER_REF = "REF is"
"""How the reason begins that a reference has other bases than a variant says."""
