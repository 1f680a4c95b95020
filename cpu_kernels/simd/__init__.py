"""Vector operations as LLVM IR, and the choice of the instruction set."""
