"""pi0 in Linen: SigLIP and Gemma read pictures and prompt, an action expert flows to actions."""
