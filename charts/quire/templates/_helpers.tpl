{{/*
Names are fixed, whatever the release is called: there is one Quire in a cluster (or in a namespace, where the scope is
that), and two that fought over one name would be refused by Helm.
*/}}

{{- define "quire.selectorLabels" -}}
app.kubernetes.io/name: quire
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "quire.labels" -}}
app.kubernetes.io/name: quire
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/part-of: quire
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* An image's whole name, from its entry in `images` (`image`) and what all of them share (`root`). */}}
{{- define "quire.image" -}}
{{- $images := .root.Values.images -}}
{{- $registry := $images.registry | trimSuffix "/" -}}
{{- $name := ternary .image.repository (printf "%s/%s" $registry .image.repository) (empty $registry) -}}
{{- if .image.digest -}}
{{ printf "%s@%s" $name .image.digest }}
{{- else -}}
{{ printf "%s:%s" $name (coalesce .image.tag $images.tag .root.Chart.AppVersion) }}
{{- end -}}
{{- end }}

{{/* The namespaces to work in, as JSON; empty means all. */}}
{{- define "quire.namespaces" -}}
{{- if and (eq .Values.rbac.scope "namespace") (empty .Values.namespaces) -}}
{{ list .Release.Namespace | toJson }}
{{- else -}}
{{ .Values.namespaces | toJson }}
{{- end -}}
{{- end }}

{{/* What the operator may do where it works: nothing that its code does not call. */}}
{{- define "quire.operatorRules" -}}
- apiGroups: [quire.dev]
  resources: [llmdeployments]
  verbs: [list, watch, patch]
- apiGroups: [quire.dev]
  resources: [llmdeployments/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [services, serviceaccounts, persistentvolumeclaims]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, patch]
- apiGroups: [""]
  resources: [events]
  verbs: [list, create]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, update, patch, delete]
# Kinds that the cluster may not have; they are used where they are found.
- apiGroups: [leaderworkerset.x-k8s.io]
  resources: [leaderworkersets]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [keda.sh]
  resources: [scaledobjects]
  verbs: [get, list, watch, create, update, patch, delete]
- apiGroups: [monitoring.coreos.com]
  resources: [servicemonitors, prometheusrules]
  verbs: [get, list, watch, create, update, patch, delete]
{{- end }}

{{/* Whether the platform assigns users: "true" or nothing. */}}
{{- define "quire.assignsUsers" -}}
{{- $known := .Capabilities.APIVersions.Has "security.openshift.io/v1" -}}
{{- if ternary $known .Values.openshift (eq (toString .Values.openshift) "auto") }}true{{ end -}}
{{- end }}

{{- define "quire.podSecurityContext" -}}
runAsNonRoot: true
{{- if not (include "quire.assignsUsers" .) }}
{{- range $name := list "runAsUser" "runAsGroup" "fsGroup" }}
{{- with get $.Values.podSecurity $name }}
{{ $name }}: {{ . | int64 }}
{{- end }}
{{- end }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "quire.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Where a component's pods run, from its values (`values`). */}}
{{- define "quire.placement" -}}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "quire.selectorLabels" $ | nindent 8 }}
{{- end }}
{{- end }}
