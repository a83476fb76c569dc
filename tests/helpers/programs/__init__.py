"""Programs that distributed tests start on several processes."""
