"""The benchmark: this worker beside the limit, an external worker and other libraries."""
