"""Synchronization auditing: parameter checksums across ranks after every optimizer step."""
