"""Effects of variants by a model: of those in a file (`scoring.score_variants`), and of every substitution in a region
(`mutagenesis.mutagenesis`)."""
