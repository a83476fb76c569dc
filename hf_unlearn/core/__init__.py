"""Basics that every room uses: files, processes, sharding, storage, Hub client, settings, text."""
