// Package components only records, in go.mod and go.sum, the upstream commands that are built
// beside ours; it is never compiled into anything.

//go:build upstream

package components

import (
	_ "github.com/containerd/containerd/v2/cmd/containerd"
	_ "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"
	_ "github.com/containerd/containerd/v2/cmd/ctr"
	_ "github.com/fullstorydev/grpcurl/cmd/grpcurl"
	_ "helm.sh/helm/v4/cmd/helm"
)
