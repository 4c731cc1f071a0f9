.DEFAULT_GOAL := help
.PHONY: help demo ask test soak fuzz check-cuda bench bench-autoscaling images crds fmt cluster-up cluster-down cluster-status clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26
	@echo 'CLUSTER=existing (or KUBECONFIG) with REGISTRY=host/path: your own cluster instead of a local one'

demo: ## from nothing to a chat: cluster, images, operator, model, a question from inside the cluster
	@scripts/demo

ask: ## another question to the demo model: make ask TEXT='The Bennets were'
	@scripts/ask "$$TEXT"

test: ## everything that CI runs
	@scripts/test

soak: ## the same with more cases, steps and requests; takes long
	@scripts/test soak

fuzz: ## feed damaged model files to their readers: make fuzz, or make fuzz TARGET=config TIME=600
	@scripts/fuzz "$${TARGET:-all}" "$${TIME:-120}"

check-cuda: ## compile the worker for CUDA as far as that goes without a GPU; nothing is run
	@scripts/check-cuda

bench: ## speed of the worker on this machine
	@cargo bench --workspace

bench-autoscaling: ## the autoscaler beside the published rules of others, as a table: make bench-autoscaling SEEDS=20
	@scripts/bench-autoscaling "$${SEEDS:-3}"

images: ## build the images into dist/images, or push them to REGISTRY
	@scripts/setup && scripts/images

crds: ## write the custom resource definition to crds/ and into the chart
	@scripts/crds

fmt: ## format the source
	@cargo fmt --all

cluster-up: ## start a Kubernetes on this machine (root; builds it the first time)
	@scripts/cluster up

cluster-down: ## end it and remove all that it left
	@scripts/cluster down

cluster-status: ## say how it is
	@scripts/cluster status

clean: ## remove what was built here (the cluster's programs stay in the cache)
	@rm -rf dist && cargo clean
