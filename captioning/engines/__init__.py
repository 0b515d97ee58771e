"""What turns an image into a caption: LLaVA in this process, or a chat server."""
