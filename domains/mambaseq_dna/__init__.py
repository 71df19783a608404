"""DNA: bases as tokens, FASTA files, classification by species and next-base modelling."""

from mambaseq.domain import Domain

domain = Domain(
    name="dna",
    summary="DNA sequences from FASTA files: which species, which base comes next",
    tokenizers={
        "base": (
            "mambaseq_dna.tokenizer:BaseTokenizer",
            "one token a base: A C G T N, lower case folded or kept",
        ),
    },
    backbones={"codons": ("mambaseq_dna.backbones:CodonStack", "three bases a step, both ways, with an answer a base")},
    encoders={
        "kmer": ("mambaseq_dna.encoders:KmerEncoder", "embeddings of k-mers, every few bases, for classifiers"),
        "frames": (
            "mambaseq_dna.frames:FrameEncoder",
            "words of bases, and how far the reading frames around them reach",
        ),
        "conv": ("mambaseq_dna.encoders:ConvEncoder", "a convolution over bases, with learned positions if wanted"),
    },
    datasets={
        "species": (
            "mambaseq_dna.species:SpeciesData",
            "which species a window comes from, regions held out",
        ),
        "genome": ("mambaseq_dna.genome:GenomeData", "next or masked bases of FASTA files"),
        "labelled": (
            "mambaseq_dna.labelled.data:LabelledData",
            "a class, labels or values a sequence: tables, FASTA, folders, BED, GFF",
        ),
        "annotated": ("mambaseq_dna.tracks:AnnotatedData", "a class for every base, from BED, GFF or GTF"),
        "signal": ("mambaseq_dna.tracks:SignalData", "values of every base or bin, from bigWig or bedGraph"),
    },
    readers={
        "fasta": ("mambaseq_dna.files.fasta:read_fasta", "records of FASTA, plain or packed, or of 2bit"),
        "labelled": (
            "mambaseq_dna.labelled.reader:read_labelled",
            "sequences of tables, FASTA, folders and intervals, cut as in training",
        ),
    },
    writers={
        "fasta": ("mambaseq_dna.files.fasta:write_fasta", "sequences as FASTA, gzipped when the name ends in .gz")
    },
    tables={
        "bed": ("mambaseq_dna.files.tracks:BedTable", "labels: neighbouring positions of a class are one interval"),
        "bedgraph": ("mambaseq_dna.files.tracks:BedGraphTable", "a number a position, bin or window, as text"),
        "bdg": ("mambaseq_dna.files.tracks:BedGraphTable", "the same as bedgraph"),
        "bigwig": ("mambaseq_dna.files.tracks:BigWigTable", "a number a position, bin or window (mambaseq[dna])"),
        "bw": ("mambaseq_dna.files.tracks:BigWigTable", "the same as bigwig"),
    },
    configs={
        "species": ("mambaseq:configs/dna/species.yaml", "species of 16 kb windows, on a GPU"),
        "strands": ("mambaseq:configs/dna/strands.yaml", "species, the same on either strand, on a GPU"),
        "genome": ("mambaseq:configs/dna/genome.yaml", "next-base pretraining, on a GPU"),
        "labelled": ("mambaseq:configs/dna/labelled.yaml", "labelled sequences: core promoters, minutes on a CPU"),
        "finetune": ("mambaseq:configs/dna/finetune.yaml", "from the pretrained model that ships, minutes on a CPU"),
        "masked": ("mambaseq:configs/dna/masked.yaml", "masked pretraining, the same on either strand, on a GPU"),
        "hg38": ("mambaseq:configs/dna/hg38.yaml", "next-base pretraining on hg38 as in the Mamba paper, on a GPU"),
        "great_apes": ("mambaseq:configs/dna/great_apes.yaml", "which great ape, as in the Mamba paper, on a GPU"),
        "five_species": ("mambaseq:configs/dna/five_species.yaml", "which of HyenaDNA's five species, on a GPU"),
        "gated_delta": ("mambaseq:configs/dna/gated_delta.yaml", "genome with the gated delta rule, on a GPU"),
        "kda": ("mambaseq:configs/dna/kda.yaml", "genome with Kimi Delta Attention, on a GPU"),
        "gla": ("mambaseq:configs/dna/gla.yaml", "genome with gated linear attention, on a GPU"),
        "mamba3": ("mambaseq:configs/dna/mamba3.yaml", "genome with Mamba-3, on a GPU"),
        "demo": ("mambaseq:configs/dna/demo.yaml", "species of 2 kb windows, minutes on a CPU"),
    },
    recipes={
        "brca1": (
            "mambaseq_dna.recipes.brca1:recipe",
            "BRCA1 saturation editing: variants, zero-shot and exon left out",
        ),
        "gue": ("mambaseq_dna.recipes.gue:recipe", "GUE (arXiv:2306.15006): thirteen tasks, beside k-mers and a CNN"),
        "genomic_benchmarks": (
            "mambaseq_dna.recipes.genomic_benchmarks:recipe",
            "Genomic Benchmarks: eight sets, beside k-mers, a CNN and published models",
        ),
        "splice": ("mambaseq_dna.recipes.splice:recipe", "splice sites of primates, and on sequence of the fly"),
        "yeast_genes": ("mambaseq_dna.recipes.yeast_genes:recipe", "genes of yeast, a class for every base"),
        "species_length": ("mambaseq_dna.recipes.species_length:recipe", "five mammals by the length of a window"),
        "human_lm": ("mambaseq_dna.recipes.human_lm:recipe", "language models of human chromosome 22, and recall"),
        "yeasts": ("mambaseq_dna.recipes.yeasts:recipe", "related yeasts, and bacteria, by windows up to 256 kb"),
    },
    commands={
        "variants": ("mambaseq_dna.variants.commands:variants", "score variants of a VCF or table: see --help"),
        "mutagenesis": (
            "mambaseq_dna.variants.commands:mutagenesis",
            "the effect of every substitution in a region, as a table and a picture: see --help",
        ),
        "split-leak": (
            "mambaseq_dna.split_leak:run",
            "what training windows read of test intervals, as published",
        ),
        "import": (
            "mambaseq_dna.published.command:run",
            "a published Caduceus or HyenaDNA as a model of ours: FOLDER --out MODEL",
        ),
    },
    reports={"demo": ("mambaseq_dna.report:report", "held-out accuracy next to k-mer logistic regression")},
)
