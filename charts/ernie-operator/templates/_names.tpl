{{/* Name of the chart, or what the user calls it. */}}
{{- define "ernie-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* Name of everything that the release makes. */}}
{{- define "ernie-operator.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "ernie-operator.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "ernie-operator.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "ernie-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "ernie-operator.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name: name an existing ServiceAccount, or set serviceAccount.create to true" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The Lease by which the operators of this release agree on one that writes. */}}
{{- define "ernie-operator.leaseName" -}}
{{- include "ernie-operator.fullname" . | replace "." "-" -}}
{{- end -}}

{{- define "ernie-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "ernie-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "ernie-operator.labels" -}}
{{ include "ernie-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: ernie-operator
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Reference of an image: (list $ .Values.operator.image). The digest wins over the tag. */}}
{{- define "ernie-operator.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- $name := printf "%s/%s" (default $root.Values.image.registry $image.registry) $image.repository -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default $root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* What tells the worker's image from others, as --worker-version and status.engine.version: its tag, or the digest alone. */}}
{{- define "ernie-operator.workerVersion" -}}
{{- with .Values.worker.image -}}
{{- coalesce .tag .digest $.Chart.AppVersion -}}
{{- end -}}
{{- end -}}

{{/* What Pod Security "restricted" asks of a container, and a read-only root besides. */}}
{{- define "ernie-operator.containerSecurityContext" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
{{- end -}}

{{- define "ernie-operator.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end -}}
