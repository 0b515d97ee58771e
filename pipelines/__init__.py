"""How data moves: recipes, shard and manifest contracts, the Ray engine, images, storage. No torch in this room."""
