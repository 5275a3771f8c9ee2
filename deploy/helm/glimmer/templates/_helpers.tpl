{{/* Return the name of the release's objects. */}}
{{- define "glimmer.name" -}}
{{- $name := ternary .Release.Name (printf "%s-glimmer" .Release.Name) (contains "glimmer" .Release.Name) -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Return the labels that select a component's pods. Takes (dict "root" $ "component" NAME). */}}
{{- define "glimmer.selector" -}}
app.kubernetes.io/name: glimmer
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Return all labels of a component's objects. Takes what glimmer.selector takes. */}}
{{- define "glimmer.labels" -}}
{{ include "glimmer.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* Return the engines as JSON: a map of stage to the values of `engine` with those of the stage in their place. */}}
{{- define "glimmer.engines" -}}
{{- $engines := dict -}}
{{- range $stage, $values := .Values.stages | default (dict "all" dict) -}}
{{- $_ := set $engines $stage (mustMergeOverwrite (deepCopy $.Values.engine) $values) -}}
{{- end -}}
{{- if not (or (hasKey $engines "all") (and (hasKey $engines "plan") (hasKey $engines "render"))) -}}
{{- fail "stages: without `all`, both `plan` and `render` are needed" -}}
{{- end -}}
{{- $engines | toJson -}}
{{- end }}

{{/* Return a value as an environment variable's text: large numbers without exponent. */}}
{{- define "glimmer.text" -}}
{{- $isWhole := false -}}
{{- if kindIs "float64" . }}{{ $isWhole = eq (floor .) . }}{{ end -}}
{{- if $isWhole }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end }}

{{/* Return variables as a list, those of `settings` in place of those of `defaults`. */}}
{{- define "glimmer.env" -}}
{{- range $name, $value := merge (dict) (.settings | default dict) .defaults }}
- name: {{ $name }}
  value: {{ include "glimmer.text" $value | quote }}
{{- end }}
{{- end }}

{{/* Return a variable from the release's Secret. Takes (dict "root" $ "name" VARIABLE "optional" BOOL). */}}
{{- define "glimmer.secretVariable" -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ include "glimmer.secretName" .root }}
      key: {{ .name }}
      optional: {{ .optional }}
{{- end }}

{{/* Return the variables of the result store, if there is one. Takes $. */}}
{{- define "glimmer.resultStore" -}}
{{- with .Values.resultStore }}
{{- if .url }}
- { name: GLIMMER_RESULT_STORE, value: {{ .url | quote }} }
{{- range $name, $value := dict "AWS_ENDPOINT_URL_S3" .endpoint "AWS_REGION" .region }}
{{- if $value }}
- { name: {{ $name }}, value: {{ $value | quote }} }
{{- end }}
{{- end }}
{{- range tuple "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
{{- include "glimmer.secretVariable" (dict "root" $ "name" . "optional" true) | nindent 0 }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "glimmer.secretName" -}}
{{- if .Values.redis.trial.enabled -}}
{{- if .Values.secretName }}{{ fail "secretName: the trial Redis brings a Secret of its own; set one of the two" }}{{ end -}}
{{ include "glimmer.name" . }}-redis
{{- else -}}
{{ required "secretName: name a Secret with GLIMMER_REDIS_URL, or enable redis.trial" .Values.secretName }}
{{- end -}}
{{- end }}

{{/* Return what all pods have: restricted pod security, nothing of the cluster's inside. Takes the user and group. */}}
{{- define "glimmer.podSecurity" -}}
automountServiceAccountToken: false
{{- /* The image has no init: as process 1, Python would ignore SIGTERM while it imports. */}}
shareProcessNamespace: true
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .user }}
  runAsGroup: {{ .group }}
  fsGroup: {{ .group }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "glimmer.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: { drop: [ALL] }
{{- end }}

{{/* Return where pods go. Takes (dict "root" $ "component" NAME "values" api or engine). */}}
{{- define "glimmer.placement" -}}
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
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "glimmer.selector" . | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
{{- end }}

{{/* Return a PodDisruptionBudget: one pod of the component at a time. Takes what glimmer.selector takes. */}}
{{- define "glimmer.disruptionBudget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "glimmer.name" .root }}-{{ .component }}
  labels:
    {{- include "glimmer.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "glimmer.selector" . | nindent 6 }}
{{- end }}

{{/* Return the PromQL of a stage's backlog in this release. Takes (dict "root" $ "stage" NAME). */}}
{{- define "glimmer.backlog" -}}
{{- $job := printf "job=\"%s/%s\"" .root.Release.Namespace (include "glimmer.name" .root) -}}
{{- if eq .stage "all" -}}
sum(max by (state) (glimmer_queue_jobs{ {{- $job -}} }))
{{- else -}}
max(glimmer_stage_backlog{stage="{{ .stage }}", {{ $job }}})
{{- end -}}
{{- end }}
