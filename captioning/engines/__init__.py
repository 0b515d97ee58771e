"""What turns an image into a caption: LLaVA or any other model in this process, or a chat server."""
