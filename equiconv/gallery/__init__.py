"""Pictures of equivariance: a rotating image and volume, steerable kernels, errors against the angle."""





