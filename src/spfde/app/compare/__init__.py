"""Many runs side by side: each candidate over several seeds, as ordinary run folders, and what came of them."""
