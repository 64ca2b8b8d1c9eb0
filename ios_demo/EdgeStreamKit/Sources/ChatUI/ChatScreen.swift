#if canImport(SwiftUI)
    import ChatCore
    import SwiftUI

    /// A conversation, a field to go on with it, and the stream gauge.
    public struct ChatScreen: View {
        private let chat: ChatModel
        @State private var draft = ""
        @State private var showsModels = false
        @FocusState private var isTyping: Bool

        public init(_ chat: ChatModel) {
            self.chat = chat
        }

        public var body: some View {
            NavigationStack {
                VStack(spacing: 0) {
                    if let notice = chat.state.notice {
                        NoticeBar(text: notice.sentence, dismiss: { chat.dismissNotice() })
                    }
                    if chat.current == nil {
                        ContentUnavailableView {
                            Label(localized("chat.noModel"), systemImage: "brain")
                        } description: {
                            Text(localized("chat.noModel.hint"))
                        } actions: {
                            Button(localized("models.choose")) { showsModels = true }
                                .buttonStyle(.borderedProminent)
                        }
                    } else {
                        Transcript(state: chat.state)
                        StreamGauge(gauge: chat.state.gauge, phase: chat.state.phase)
                        composer
                    }
                }
                .navigationTitle(chat.current?.manifest.name ?? localized("app.title"))
                .toolbar {
                    ToolbarItem(placement: .primaryAction) {
                        Menu(localized("chat.more"), systemImage: "ellipsis.circle") {
                            Button(localized("models.choose"), systemImage: "square.stack.3d.up") { showsModels = true }
                            Button(localized("chat.regenerate"), systemImage: "arrow.clockwise") {
                                Task { await chat.regenerate() }
                            }
                            .disabled(!chat.state.canRegenerate)
                            Button(localized("chat.clear"), systemImage: "trash", role: .destructive) {
                                Task { await chat.clear() }
                            }
                            .disabled(chat.state.phase != .idle)
                        }
                    }
                }
                .sheet(isPresented: $showsModels) {
                    ModelPicker(chat: chat)
                }
            }
        }

        private var composer: some View {
            HStack(alignment: .bottom) {
                TextField(localized("chat.message"), text: $draft, axis: .vertical)
                    .lineLimit(1...6)
                    .textFieldStyle(.roundedBorder)
                    .focused($isTyping)
                    .onSubmit { send() }
                if chat.state.phase == .writing || isReading {
                    Button(localized("chat.stop"), systemImage: "stop.circle.fill") {
                        Task { await chat.stop() }
                    }
                    .keyboardShortcut(".", modifiers: .command)
                } else {
                    Button(localized("chat.send"), systemImage: "arrow.up.circle.fill") { send() }
                        .keyboardShortcut(.return, modifiers: .command)
                        .disabled(!chat.state.canSend || isBlank)
                }
            }
            .labelStyle(.iconOnly)
            .font(.title2)
            .padding()
        }

        private var isReading: Bool {
            if case .reading = chat.state.phase { true } else { false }
        }

        private var isBlank: Bool {
            draft.trimmingCharacters(in: .whitespacesAndNewlines).isEmpty
        }

        private func send() {
            guard chat.state.canSend, !isBlank else { return }
            let text = draft
            draft = ""
            Task { await chat.send(text) }
        }
    }

    private struct NoticeBar: View {
        let text: String
        let dismiss: () -> Void

        var body: some View {
            HStack {
                Label(text, systemImage: "exclamationmark.triangle")
                    .frame(maxWidth: .infinity, alignment: .leading)
                Button(localized("notice.dismiss"), systemImage: "xmark", action: dismiss)
                    .labelStyle(.iconOnly)
            }
            .font(.callout)
            .padding()
            .background(.yellow.opacity(0.2))
            .accessibilityElement(children: .contain)
        }
    }

    /// Follows what is being written, unless the reader has scrolled up.
    private struct Transcript: View {
        let state: ChatState

        var body: some View {
            ScrollView {
                LazyVStack(alignment: .leading, spacing: 16) {
                    if state.droppedCount > 0 {
                        Text(localized("chat.dropped \(state.droppedCount)"))
                            .font(.footnote)
                            .foregroundStyle(.secondary)
                    }
                    ForEach(state.messages) { message in
                        MessageRow(message: message, isOpen: state.isBusy && message.id == state.messages.last?.id)
                    }
                }
                .padding()
            }
            .defaultScrollAnchor(.bottom)
            .scrollDismissesKeyboard(.interactively)
        }
    }

    private struct MessageRow: View {
        let message: ChatState.Message
        let isOpen: Bool

        var body: some View {
            VStack(alignment: .leading, spacing: 4) {
                Text(speaker)
                    .font(.caption.bold())
                    .foregroundStyle(.secondary)
                if let recalled = message.recalled {
                    let when = recalled.when.formatted(.relative(presentation: .named))
                    Label(
                        localized("chat.recalled \(when) \(recalled.text)"),
                        systemImage: "arrow.uturn.backward"
                    )
                    .font(.caption)
                    .foregroundStyle(.secondary)
                }
                if message.text.isEmpty && isOpen {
                    ProgressView()
                } else {
                    Text(message.text)
                        .textSelection(.enabled)
                }
                if message.isCut {
                    Text(localized("chat.cut"))
                        .font(.caption)
                        .foregroundStyle(.secondary)
                }
            }
            .frame(maxWidth: .infinity, alignment: .leading)
            // one element per message; while it is written it updates often, and VoiceOver asks at its own pace
            .accessibilityElement(children: .ignore)
            .accessibilityLabel(speaker)
            .accessibilityValue(message.text.isEmpty ? localized("phase.thinking") : message.text)
            .accessibilityAddTraits(isOpen ? .updatesFrequently : [])
        }

        private var speaker: String {
            message.role == .user ? localized("chat.you") : localized("chat.model")
        }
    }
#endif
