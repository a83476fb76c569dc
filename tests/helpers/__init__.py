"""What several test files share: small models and rows, slow twins, a loopback Hub, programs to start."""
