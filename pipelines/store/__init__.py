"""What lies on disk: manifests, atomic files, feature tars, remote storage, verification."""
