"""From adapters to models that others serve: adapters fused into their base."""
