"""Memory and time of a request, estimated from a configuration."""
