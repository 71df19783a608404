"""Published models of DNA as models of ours: Caduceus and HyenaDNA, with the same outputs."""
