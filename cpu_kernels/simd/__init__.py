"""Vector instructions as LLVM IR, and the choice among their variants."""
