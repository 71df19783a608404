"""What this domain brings. Nothing is imported before it is used, and this file imports no torch."""

from mambaseq.domain import Domain

domain = Domain(
    name="protein",
    summary="chains of amino acids: which residue is hidden, what structure has each?",
    datasets={"chains": ("mambaseq_protein.chains:Chains", "made-up chains: masked residues, or a label a residue")},
    readers={"fasta": ("mambaseq_protein.chains:read_fasta", "FASTA files of amino acids")},
    configs={
        "pretrain": ("mambaseq_protein:configs/pretrain.yaml", "tell hidden residues; two minutes on a CPU"),
        "structure": ("mambaseq_protein:configs/structure.yaml", "helix, strand or coil of each residue, few labels"),
    },
    reports={"chains": ("mambaseq_protein.report:report", "accuracy beside the best that there is")},
)
