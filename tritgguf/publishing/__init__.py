"""Publishing: a family of measured files from a plan of sources and configurations."""
